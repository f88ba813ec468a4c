// A product as cublasLt describes it, and the algorithm that cublasLt chose.
//
// A choice takes tens of microseconds on the host, so it is made once for each kind of product and
// cached. An algorithm may split the sum over k only if the partial sums stay in the accumulation
// type and a separate step adds them: partial sums in the result's type would be sums in half
// precision.
//
// The workspace is a tensor from torch's allocator that lives for one call. It is therefore reused
// in stream order, belongs to the graph's memory during capture, and is never shared between
// streams. torch's handle has a workspace too, but torch does not expose it. Most algorithms need
// none.
//
// cuBLAS's documentation says that a bias is cheapest in a product that adds nothing else, so
// callers add it in the first product of a sum. If `can_add_bias` is false, gemm copies the bias
// into D.
//
// If cublasLt fails, cuBLAS computes the product, as in torch. An error of the device itself
// appears again there.
#include "blas_lt.h"

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "blas_types.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// The most that torch gives cuBLAS on any device.
constexpr uint64_t kMaxWorkspace = uint64_t{32} << 20;
constexpr size_t kWorkspaceAlignment = 256;

// Enough for a model with a hundred shapes at forty sequence lengths.
constexpr size_t kMaxChoices = 4096;

// Sums up to this length are not split. A split sum is rounded to the result's type before a bias
// is added, so it would be rounded twice.
constexpr int kLongestWithBias = 512;

// Returns the largest power of two up to 256 that divides the address; cublasLt needs no larger
// one.
uint32_t alignment_of(const void* data) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(data) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Returns TF32 for float32 products if the call allows it and torch has set it in the handle.
cublasComputeType_t lt_compute_type(cublasHandle_t handle, const GemmCall& call) {
  if (call.in != DType::kFloat32 || !call.allow_tf32) return compute_type(call);
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
  check(cublasGetMathMode(handle, &mode), "cublasGetMathMode", call);
  const int flags = mode & ~CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  return flags == CUBLAS_TF32_TENSOR_OP_MATH ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

// Kernels may read a bias 16 bytes at a time, but the heuristic does not know its alignment. A less
// aligned bias can fault and end the CUDA context.
bool can_add_bias(const GemmCall& call) {
  return alignment_of(call.c) >= 16 && call.k <= kLongestWithBias;
}

// The descriptors of one product. They own no memory.
class Product {
 public:
  Product(const GemmCall& call, cublasComputeType_t compute) : call_(call) {
    const cudaDataType_t in = data_type(call.in), out = data_type(call.out);
    const cudaDataType_t scale = call.out == DType::kFloat64 ? CUDA_R_64F : CUDA_R_32F;
    check(cublasLtMatmulDescInit(&matmul_, compute, scale), "cublasLtMatmulDescInit", call);
    set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(operation(call.trans_a)));
    set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(operation(call.trans_b)));
    if (call.adds_bias()) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_BIAS});
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, call.c);
    }
    lay_out(&a_, in, call.trans_a ? call.k : call.m, call.trans_a ? call.m : call.k, call.lda);
    lay_out(&b_, in, call.trans_b ? call.n : call.k, call.trans_b ? call.k : call.n, call.ldb);
    if (reads_c()) lay_out(&c_, out, call.m, call.n, call.ldc);
    lay_out(&d_, out, call.m, call.n, call.ldd);
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  // Returns whether cublasLt has an algorithm, and stores it in `result`.
  bool ask(cublasLtHandle_t handle, cublasLtMatmulHeuristicResult_t* result) {
    cublasLtMatmulPreferenceOpaque_t preference;
    check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit", call_);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute", call_);
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMaxWorkspace);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(call_.a));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(call_.b));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(c()));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(call_.d));
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, &matmul_, &a_, &b_, c_layout(), &d_, &preference, 1, result, &found);
    return status == CUBLAS_STATUS_SUCCESS && found > 0 && result->state == CUBLAS_STATUS_SUCCESS;
  }

  cublasStatus_t run(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algorithm,
                     void* workspace, size_t bytes, void* stream) {
    const Scalar alpha(call_, call_.alpha), beta(call_, call_.add && !call_.adds_bias());
    return cublasLtMatmul(handle, &matmul_, alpha.get(), call_.a, &a_, call_.b, &b_, beta.get(),
                          c(), c_layout(), call_.d, &d_, &algorithm, workspace, bytes,
                          static_cast<cudaStream_t>(stream));
  }

 private:
  // cublasLt reads a separate C only if C is neither D nor a bias. Otherwise D and D's layout take
  // the place of C.
  bool reads_c() const { return !call_.in_place() && !call_.adds_bias(); }
  const void* c() const { return reads_c() ? call_.c : call_.d; }
  cublasLtMatrixLayout_t c_layout() { return reads_c() ? &c_ : &d_; }

  template <typename Value>
  void set(cublasLtMatmulDescAttributes_t attribute, Value value) {
    check(cublasLtMatmulDescSetAttribute(&matmul_, attribute, &value, sizeof value),
          "cublasLtMatmulDescSetAttribute", call_);
  }
  void lay_out(cublasLtMatrixLayout_t layout, cudaDataType_t type, int rows, int cols, int ld) {
    check(cublasLtMatrixLayoutInit(layout, type, static_cast<uint64_t>(rows),
                                   static_cast<uint64_t>(cols), ld),
          "cublasLtMatrixLayoutInit", call_);
  }

  const GemmCall& call_;
  cublasLtMatmulDescOpaque_t matmul_;
  cublasLtMatrixLayoutOpaque_t a_, b_, c_, d_;
};

// The algorithm for one kind of product, if there is one, and the workspace bytes that it needs.
struct Choice {
  bool found = false;
  cublasLtMatmulAlgo_t algorithm = {};
  size_t workspace = 0;
};

// Everything that a choice depends on.
using Kind = std::array<int64_t, 12>;

Kind kind_of(const Blas& blas, const GemmCall& call, cublasComputeType_t compute) {
  const int64_t how = call.trans_a + 2 * call.trans_b + 4 * call.add + 8 * call.in_place();
  const int64_t types = static_cast<int64_t>(call.in) | static_cast<int64_t>(call.out) << 8 |
                        static_cast<int64_t>(compute) << 16;
  const int64_t operands = alignment_of(call.a) | int64_t{alignment_of(call.b)} << 16;
  const int64_t results = alignment_of(call.c) | int64_t{alignment_of(call.d)} << 16;
  return {call.m,   call.n, call.k, call.lda, call.ldb, call.ldc,
          call.ldd, how,    types,  operands, results,  blas.like.get_device_index()};
}

// The cache of choices, shared by all threads.
class Choices {
 public:
  Choice of(const Kind& kind, cublasLtHandle_t handle, Product& product) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = choices_.find(kind);
    if (known != choices_.end()) return known->second;
    cublasLtMatmulHeuristicResult_t result = {};
    Choice choice;
    choice.found = product.ask(handle, &result);
    choice.algorithm = result.algo;
    choice.workspace = result.workspaceSize;
    if (choices_.size() >= kMaxChoices) choices_.clear();
    choices_.emplace(kind, choice);
    return choice;
  }

  // Refuses this kind of product from now on. Prints the first failure other than "not supported".
  void refuse(const Kind& kind, cublasStatus_t status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    choices_[kind] = Choice{};
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || told_) return;
    told_ = true;
    std::fprintf(stderr,
                 "rasa_ext: cublasLtMatmul failed with cuBLAS status %d; cublasGemmEx takes its "
                 "place for products of that kind.\n",
                 static_cast<int>(status));
  }

 private:
  bool told_ = false;
  std::mutex mutex_;
  std::map<Kind, Choice> choices_;
};

Choices& choices() {
  static Choices all;
  return all;
}

}  // namespace

bool gemm_lt(const Blas& blas, const GemmCall& call) {
  if (call.adds_bias() && !can_add_bias(call)) return false;
  // A cuBLAS handle is also a cublasLt handle.
  const auto handle = static_cast<cublasLtHandle_t>(blas.handle);
  const cublasComputeType_t compute =
      lt_compute_type(static_cast<cublasHandle_t>(blas.handle), call);
  Product product(call, compute);
  const Kind kind = kind_of(blas, call, compute);
  const Choice choice = choices().of(kind, handle, product);
  if (!choice.found) return false;
  std::optional<Tensor> memory;
  void* workspace = nullptr;
  if (choice.workspace > 0) {
    size_t space = choice.workspace + kWorkspaceAlignment;
    memory = empty_bytes(blas.like, space);
    workspace = memory->data_ptr();
    std::align(kWorkspaceAlignment, choice.workspace, workspace, space);
  }
  const cublasStatus_t status =
      product.run(handle, choice.algorithm, workspace, choice.workspace, blas.stream);
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  choices().refuse(kind, status);
  return false;
}

}  // namespace rasa_ext
