// The three cuBLAS products on the CPU, with cuBLAS's arguments: pointers, leading dimensions,
// strides, scalars and types. Refuses the same calls as cuBLAS, and records every call for tests.
#include "cublas_v2.h"

#include <string>

#include "products.h"

using standin::Product;

namespace {

cublasMath_t mode_of_handle = CUBLAS_TF32_TENSOR_OP_MATH;

Product product_of(cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
                   const void* alpha, cudaDataType in, int lda, cudaDataType in_b, int ldb,
                   const void* beta, cudaDataType out, int ldc, cublasComputeType_t compute) {
  return {transa,
          transb,
          m,
          n,
          k,
          standin::scalar(compute, alpha),
          standin::scalar(compute, beta),
          in,
          in_b,
          out,
          lda,
          ldb,
          ldc,
          ldc,
          compute};
}

std::string mode() { return " math=" + std::to_string(mode_of_handle); }

const void* offset(const void* data, cudaDataType type, int64_t elements) {
  return static_cast<const char*>(data) + elements * standin::size_of(type);
}

}  // namespace

cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = mode_of_handle;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t mode) {
  mode_of_handle = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t transa, cublasOperation_t transb,
                            int m, int n, int k, const void* alpha, const void* A,
                            cudaDataType Atype, int lda, const void* B, cudaDataType Btype, int ldb,
                            const void* beta, void* C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t computeType, cublasGemmAlgo_t) {
  const Product p = product_of(transa, transb, m, n, k, alpha, Atype, lda, Btype, ldb, beta, Ctype,
                               ldc, computeType);
  standin::record("GemmEx", p, 1, mode());
  const cublasStatus_t status = standin::judge(p);
  if (status == CUBLAS_STATUS_SUCCESS) standin::multiply(p, A, B, C, C);
  return status;
}

cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void* alpha, const void* A, cudaDataType Atype, int lda, long long strideA, const void* B,
    cudaDataType Btype, int ldb, long long strideB, const void* beta, void* C, cudaDataType Ctype,
    int ldc, long long strideC, int batchCount, cublasComputeType_t computeType, cublasGemmAlgo_t) {
  const Product p = product_of(transa, transb, m, n, k, alpha, Atype, lda, Btype, ldb, beta, Ctype,
                               ldc, computeType);
  standin::record("GemmStridedBatchedEx", p, batchCount,
                  mode() + " strides=" + std::to_string(strideA) + "," + std::to_string(strideB) +
                      "," + std::to_string(strideC));
  const cublasStatus_t status = standin::judge(p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (int64_t i = 0; i < batchCount; ++i) {
    void* result = const_cast<void*>(offset(C, Ctype, i * strideC));
    standin::multiply(p, offset(A, Atype, i * strideA), offset(B, Btype, i * strideB), result,
                      result);
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
  const Product p = product_of(transa, transb, m, n, k, alpha, Atype, lda, Btype, ldb, beta, Ctype,
                               ldc, computeType);
  standin::record("GemmBatchedEx", p, batchCount, mode());
  const cublasStatus_t status = standin::judge(p);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  // cuBLAS requires this alignment for 16-bit types and TF32; without it a kernel would fault.
  const bool at_16 = Atype == CUDA_R_16F || Atype == CUDA_R_16BF ||
                     (Atype == CUDA_R_32F && (mode_of_handle & CUBLAS_TF32_TENSOR_OP_MATH) != 0);
  for (int i = 0; i < batchCount && at_16; ++i) {
    for (const void* each : {Aarray[i], Barray[i], static_cast<const void*>(Carray[i])}) {
      if (reinterpret_cast<uintptr_t>(each) % 16 != 0) return CUBLAS_STATUS_EXECUTION_FAILED;
    }
  }
  for (int i = 0; i < batchCount; ++i) {
    standin::multiply(p, Aarray[i], Barray[i], Carray[i], Carray[i]);
  }
  return status;
}

// For the tests: the handle's math mode, which torch sets.
extern "C" int current_math_mode() { return mode_of_handle; }

extern "C" void set_math_mode(int mode) { mode_of_handle = static_cast<cublasMath_t>(mode); }
