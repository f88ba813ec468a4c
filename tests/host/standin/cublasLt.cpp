// cublasLt on the CPU, with the same descriptors. An algorithm stores what it was chosen for, and
// refuses a product of another kind or with a smaller alignment than promised. It overwrites the
// whole workspace. Tests can make it refuse products.
#include "cublasLt.h"

#include <chrono>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <new>
#include <string>
#include <thread>

#include "products.h"

using standin::Product;

namespace {

// Contents of the opaque structs.
struct Layout {
  uint64_t type, rows, cols;
  int64_t ld;
  bool operator==(const Layout& other) const {
    return type == other.type && rows == other.rows && cols == other.cols && ld == other.ld;
  }
};
struct Operation {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  int32_t transa, transb;
  uint32_t epilogue;
  const void* bias;
};
struct Preference {
  uint64_t workspace;
  uint32_t reduction;
  uint32_t alignment[4];  // of A, B, C, D
};
struct Algorithm {
  uint64_t shape;
  uint32_t workspace;
  uint16_t alignment[5];  // of A, B, C, D and the bias
};

template <typename Value, typename Opaque>
cublasStatus_t init(Opaque* opaque, const Value& value) {
  static_assert(sizeof(Value) <= sizeof(Opaque));
  new (opaque) Value(value);
  return CUBLAS_STATUS_SUCCESS;
}

template <typename Value, typename Opaque>
Value& inside(Opaque* opaque) {
  return *std::launder(reinterpret_cast<Value*>(opaque));
}

std::string heuristics;
std::mutex heuristics_mutex;
enum class Refusal { kNone, kStatus, kNoResult, kState, kProduct, kExecution };
Refusal refusal = Refusal::kNone;
int refused = 0;  // products

uint16_t alignment_of(const void* data) {
  uint16_t alignment = 256;
  while (reinterpret_cast<uintptr_t>(data) % alignment != 0) alignment /= 2;
  return alignment;
}

// The product that the descriptors describe; alpha and beta are not set.
Product product_of(const Operation& operation, const Layout& a, const Layout& b, const Layout& c,
                   const Layout& d) {
  Product p{};
  p.transa = static_cast<cublasOperation_t>(operation.transa);
  p.transb = static_cast<cublasOperation_t>(operation.transb);
  p.m = static_cast<int64_t>(d.rows);
  p.n = static_cast<int64_t>(d.cols);
  p.k = static_cast<int64_t>(p.transa == CUBLAS_OP_N ? a.cols : a.rows);
  p.in = static_cast<cudaDataType>(a.type);
  p.in_b = static_cast<cudaDataType>(b.type);
  p.out = static_cast<cudaDataType>(d.type);
  p.lda = a.ld;
  p.ldb = b.ld;
  p.ldc = c.ld;
  p.ldd = d.ld;
  p.compute = operation.compute;
  return p;
}

cublasStatus_t judge(const Operation& operation, const Layout& a, const Layout& b, const Layout& c,
                     const Layout& d, const Product& p) {
  const auto is = [](const Layout& layout, bool transposed, int64_t rows, int64_t cols) {
    return static_cast<int64_t>(transposed ? layout.cols : layout.rows) == rows &&
           static_cast<int64_t>(transposed ? layout.rows : layout.cols) == cols;
  };
  if (!is(a, p.transa == CUBLAS_OP_T, p.m, p.k) || !is(b, p.transb == CUBLAS_OP_T, p.k, p.n) ||
      !is(c, false, p.m, p.n) || c.type != d.type) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const bool wide = operation.compute == CUBLAS_COMPUTE_64F;
  if (operation.scale != (wide ? CUDA_R_64F : CUDA_R_32F)) return CUBLAS_STATUS_INVALID_VALUE;
  if ((operation.epilogue == CUBLASLT_EPILOGUE_BIAS) != (operation.bias != nullptr)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  return standin::judge(p);
}

// A hash of everything that an algorithm may depend on, except alignment.
uint64_t hash_of(const Operation& operation, std::initializer_list<const Layout*> layouts) {
  uint64_t hash = 0;
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15; };
  for (const Layout* layout : layouts) {
    for (const uint64_t value : {layout->type, layout->rows, layout->cols}) add(value);
    add(static_cast<uint64_t>(layout->ld));
  }
  add(operation.compute);
  add(static_cast<uint64_t>(operation.transa * 2 + operation.transb));
  add(operation.epilogue);
  return hash;
}

template <typename Value>
cublasStatus_t put(Value* place, const void* value, size_t bytes) {
  if (value == nullptr || bytes != sizeof(Value)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(place, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType type,
                                        uint64_t rows, uint64_t cols, int64_t ld) {
  return init(layout, Layout{static_cast<uint64_t>(type), rows, cols, ld});
}

cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t matmul, cublasComputeType_t compute,
                                      cudaDataType_t scale) {
  return init(matmul, Operation{compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT,
                                nullptr});
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t matmul,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  Operation& operation = inside<Operation>(matmul);
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return put(&operation.transa, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return put(&operation.transb, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return put(&operation.epilogue, value, bytes);
    default:
      return put(&operation.bias, value, bytes);
  }
}

cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference) {
  return init(preference, Preference{0, 7, {256, 256, 256, 256}});
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  Preference& wanted = inside<Preference>(preference);
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return put(&wanted.workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      return put(&wanted.reduction, value, bytes);
    default:
      return put(&wanted.alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value,
                 bytes);
  }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t matmul, cublasLtMatrixLayout_t adesc,
    cublasLtMatrixLayout_t bdesc, cublasLtMatrixLayout_t cdesc, cublasLtMatrixLayout_t ddesc,
    cublasLtMatmulPreference_t preference, int, cublasLtMatmulHeuristicResult_t results[],
    int* count) {
  const Operation& operation = inside<Operation>(matmul);
  const Layout &a = inside<Layout>(adesc), &b = inside<Layout>(bdesc), &c = inside<Layout>(cdesc),
               &d = inside<Layout>(ddesc);
  const Preference& wanted = inside<Preference>(preference);
  const Product p = product_of(operation, a, b, c, d);
  std::string line =
      "m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k);
  for (const uint64_t value : {uint64_t{p.compute}, a.type, d.type})
    line += "," + std::to_string(value);
  line += operation.transa ? ",T" : ",N";
  line += operation.transb ? "T" : "N";
  for (const int64_t ld : {p.lda, p.ldb, p.ldc, p.ldd}) line += "," + std::to_string(ld);
  line += " workspace=" + std::to_string(wanted.workspace) +
          " reduction=" + std::to_string(wanted.reduction) + " alignment=";
  Algorithm algorithm{hash_of(operation, {&a, &b, &c, &d}), 0, {}};
  for (int i = 0; i < 4; ++i) {
    algorithm.alignment[i] = static_cast<uint16_t>(wanted.alignment[i]);
    line += (i == 0 ? "" : ",") + std::to_string(wanted.alignment[i]);
  }
  algorithm.alignment[4] = alignment_of(operation.bias);
  if (operation.bias != nullptr) line += " bias=" + std::to_string(algorithm.alignment[4]);
  {
    const std::lock_guard<std::mutex> lock(heuristics_mutex);
    heuristics += line + "\n";
  }
  // Sums of 16 and more terms are split into two partial sums in the workspace.
  const uint64_t parts = p.k >= 16 ? 2 * 8 * static_cast<uint64_t>(p.m * p.n) : 0;
  algorithm.workspace = static_cast<uint32_t>(parts <= wanted.workspace ? parts : 0);

  // About the time of a real choice, so that a test sees threads that ask for the same one at once.
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  *count = 0;
  if (refusal == Refusal::kStatus) return CUBLAS_STATUS_NOT_SUPPORTED;
  const cublasStatus_t status = judge(operation, a, b, c, d, p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  if (refusal == Refusal::kNoResult) return CUBLAS_STATUS_SUCCESS;
  *count = 1;
  static_assert(sizeof algorithm <= sizeof results[0].algo);
  std::memcpy(&results[0].algo, &algorithm, sizeof algorithm);
  results[0].workspaceSize = algorithm.workspace;
  results[0].state =
      refusal == Refusal::kState ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t matmul, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t adesc, const void* B,
                              cublasLtMatrixLayout_t bdesc, const void* beta, const void* C,
                              cublasLtMatrixLayout_t cdesc, void* D, cublasLtMatrixLayout_t ddesc,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t bytes,
                              cudaStream_t) {
  if (refusal == Refusal::kProduct) {
    ++refused;
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (refusal == Refusal::kExecution) return CUBLAS_STATUS_EXECUTION_FAILED;
  const Operation& operation = inside<Operation>(matmul);
  const Layout &a = inside<Layout>(adesc), &b = inside<Layout>(bdesc), &c = inside<Layout>(cdesc),
               &d = inside<Layout>(ddesc);
  Algorithm algorithm;
  std::memcpy(&algorithm, algo, sizeof algorithm);
  if (algorithm.shape != hash_of(operation, {&a, &b, &c, &d})) return CUBLAS_STATUS_INVALID_VALUE;
  const void* pointers[] = {A, B, C, D, operation.bias};
  for (int i = 0; i < 5; ++i) {
    if (alignment_of(pointers[i]) < algorithm.alignment[i]) return CUBLAS_STATUS_INVALID_VALUE;
  }
  // Kernels read a bias 16 bytes at a time; a misaligned one would fault and end the CUDA context.
  if (operation.bias != nullptr && alignment_of(operation.bias) < 16) {
    ++refused;
    return CUBLAS_STATUS_EXECUTION_FAILED;
  }
  if (bytes < algorithm.workspace || alignment_of(workspace) < 256) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (C == D && !(c == d)) return CUBLAS_STATUS_INVALID_VALUE;
  Product p = product_of(operation, a, b, c, d);
  p.alpha = standin::scalar(p.compute, alpha);
  p.beta = standin::scalar(p.compute, beta);
  p.bias = operation.bias;
  const cublasStatus_t status = judge(operation, a, b, c, d, p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  if (workspace != nullptr) std::memset(workspace, 0xff, bytes);
  const char* compute = p.compute == CUBLAS_COMPUTE_64F   ? " compute=64F"
                        : p.compute == CUBLAS_COMPUTE_32F ? " compute=32F"
                                                          : " compute=TF32";
  standin::record("Matmul", p, 1,
                  compute + std::string(p.bias ? " bias" : "") + (C != D ? " C!=D" : ""));
  standin::multiply(p, A, B, C, D);
  return CUBLAS_STATUS_SUCCESS;
}

// For the tests: the algorithms requested since the last call of this function. Each line has all
// that the choice may depend on.
extern "C" const char* asked_heuristics() {
  static std::string text;
  text.swap(heuristics);
  heuristics.clear();
  return text.c_str();
}

// Sets how cublasLt refuses products from now on: a `Refusal`.
extern "C" void refuse_products(int how) {
  refusal = static_cast<Refusal>(how);
  refused = 0;
}

// The number of products that it refused to run since then.
extern "C" int refused_products() { return refused; }
