// The three cuBLAS products on the CPU, from the same arguments: pointers, leading dimensions,
// strides, scalars and types. Refuses what cuBLAS refuses, and records every call for the tests.
#include "cublas_v2.h"

#include <algorithm>
#include <string>
#include <vector>

#include "numbers.h"

using rasa_ext::load;
using rasa_ext::store;

namespace {

std::vector<std::string> calls;
cublasMath_t math_mode = CUBLAS_TF32_TENSOR_OP_MATH;

rasa_ext::DType dtype_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return rasa_ext::DType::kFloat64;
    case CUDA_R_32F:
      return rasa_ext::DType::kFloat32;
    case CUDA_R_16BF:
      return rasa_ext::DType::kBFloat16;
    default:
      return rasa_ext::DType::kFloat16;
  }
}

int width(cudaDataType type) { return static_cast<int>(rasa_ext::size_of(dtype_of(type))); }

struct Product {
  cublasOperation_t transa, transb;
  int m, n, k;
  const void *alpha, *beta;
  cudaDataType in, in_b, out;
  int lda, ldb, ldc;
  cublasComputeType_t compute;
};

double scalar(const Product& p, const void* value) {
  return p.compute == CUBLAS_COMPUTE_64F ? *static_cast<const double*>(value)
                                         : *static_cast<const float*>(value);
}

// The documented limits of the leading dimensions, and the documented combinations of types.
cublasStatus_t judge(const Product& p) {
  if (p.m < 0 || p.n < 0 || p.k < 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.lda < std::max(1, p.transa == CUBLAS_OP_N ? p.m : p.k)) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.ldb < std::max(1, p.transb == CUBLAS_OP_N ? p.k : p.n)) return CUBLAS_STATUS_INVALID_VALUE;
  if (p.ldc < std::max(1, p.m)) return CUBLAS_STATUS_INVALID_VALUE;
  const bool wide = p.in == CUDA_R_64F;
  const bool fits = p.in == p.in_b && (p.out == p.in || (!wide && p.out == CUDA_R_32F)) &&
                    (p.compute == CUBLAS_COMPUTE_64F) == wide;
  return fits ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

void multiply(const Product& p, const void* a, const void* b, void* c) {
  const double alpha = scalar(p, p.alpha), beta = scalar(p, p.beta);
  const rasa_ext::DType in = dtype_of(p.in), out = dtype_of(p.out);
  for (int64_t j = 0; j < p.n; ++j) {
    for (int64_t i = 0; i < p.m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < p.k; ++l) {
        sum += load(a, in, p.transa == CUBLAS_OP_N ? i + l * p.lda : l + i * p.lda) *
               load(b, in, p.transb == CUBLAS_OP_N ? l + j * p.ldb : j + l * p.ldb);
      }
      const int64_t at = i + j * p.ldc;
      // Where beta is 0, C may hold anything.
      store(c, out, at, alpha * sum + (beta == 0 ? 0 : beta * load(c, out, at)));
    }
  }
}

void record(const char* name, const Product& p, int batch) {
  calls.push_back(std::string(name) + " m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) +
                  " k=" + std::to_string(p.k) + " batch=" + std::to_string(batch) +
                  " beta=" + std::to_string(static_cast<int>(scalar(p, p.beta))) +
                  " out=" + std::to_string(width(p.out)) + " math=" + std::to_string(math_mode));
}

const void* offset(const void* data, cudaDataType type, int64_t elements) {
  return static_cast<const char*>(data) + elements * width(type);
}

}  // namespace

cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = math_mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t mode) {
  math_mode = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t transa, cublasOperation_t transb,
                            int m, int n, int k, const void* alpha, const void* A,
                            cudaDataType Atype, int lda, const void* B, cudaDataType Btype, int ldb,
                            const void* beta, void* C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t computeType, cublasGemmAlgo_t) {
  const Product p{transa, transb, m,     n,   k,   alpha, beta,
                  Atype,  Btype,  Ctype, lda, ldb, ldc,   computeType};
  record("GemmEx", p, 1);
  const cublasStatus_t status = judge(p);
  if (status == CUBLAS_STATUS_SUCCESS) multiply(p, A, B, C);
  return status;
}

cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void* alpha, const void* A, cudaDataType Atype, int lda, long long strideA, const void* B,
    cudaDataType Btype, int ldb, long long strideB, const void* beta, void* C, cudaDataType Ctype,
    int ldc, long long strideC, int batchCount, cublasComputeType_t computeType, cublasGemmAlgo_t) {
  const Product p{transa, transb, m,     n,   k,   alpha, beta,
                  Atype,  Btype,  Ctype, lda, ldb, ldc,   computeType};
  record("GemmStridedBatchedEx", p, batchCount);
  calls.back() += " strides=" + std::to_string(strideA) + "," + std::to_string(strideB) + "," +
                  std::to_string(strideC);
  const cublasStatus_t status = judge(p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (int64_t i = 0; i < batchCount; ++i) {
    multiply(p, offset(A, Atype, i * strideA), offset(B, Btype, i * strideB),
             const_cast<void*>(offset(C, Ctype, i * strideC)));
  }
  return status;
}

cublasStatus_t cublasGemmBatchedEx(cublasHandle_t, cublasOperation_t transa,
                                   cublasOperation_t transb, int m, int n, int k, const void* alpha,
                                   const void* const Aarray[], cudaDataType Atype, int lda,
                                   const void* const Barray[], cudaDataType Btype, int ldb,
                                   const void* beta, void* const Carray[], cudaDataType Ctype,
                                   int ldc, int batchCount, cublasComputeType_t computeType,
                                   cublasGemmAlgo_t) {
  const Product p{transa, transb, m,     n,   k,   alpha, beta,
                  Atype,  Btype,  Ctype, lda, ldb, ldc,   computeType};
  record("GemmBatchedEx", p, batchCount);
  const cublasStatus_t status = judge(p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (int i = 0; i < batchCount; ++i) multiply(p, Aarray[i], Barray[i], Carray[i]);
  return status;
}

// For the tests: what was called since the last reset, one call a line, and the math mode now.
extern "C" const char* recorded_calls() {
  static std::string text;
  text.clear();
  for (const std::string& call : calls) text += call + "\n";
  return text.c_str();
}

extern "C" void reset_calls() { calls.clear(); }

extern "C" int current_math_mode() { return math_mode; }
