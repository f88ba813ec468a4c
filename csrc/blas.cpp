// Sums run in float32 (float64 for float64) whatever the operands' type, and no product may be
// summed in halves: torch's own default lets cuBLAS do that.
//
// TF32 follows torch's flag: the handle comes from torch with that flag in its math mode, which
// is kept. cuBLAS repeats its results bit for bit on the one stream and workspace that torch
// gave the handle, so torch's determinism flag needs no other path here; and since that
// workspace is torch's, calls can be captured into a graph.
#include "blas.h"

#include <cublas_v2.h>

#include <stdexcept>
#include <string>

namespace rasa_ext {
namespace {

void check(cublasStatus_t status, const char* what, const GemmCall& call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(what) + ": expected success, got cuBLAS status " +
                           std::to_string(static_cast<int>(status)) + " for m, n, k = " +
                           std::to_string(call.m) + ", " + std::to_string(call.n) + ", " +
                           std::to_string(call.k) + " and batch " + std::to_string(call.batch));
}

cudaDataType_t data_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return CUDA_R_64F;
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

cublasOperation_t operation(bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

cublasComputeType_t compute_type(const GemmCall& call) {
  return call.out == DType::kFloat64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
}

// alpha or beta in the type that the compute type asks for.
class Scalar {
 public:
  Scalar(const GemmCall& call, double value)
      : double_(value), float_(static_cast<float>(value)), wide_(call.out == DType::kFloat64) {}
  const void* get() const {
    return wide_ ? static_cast<const void*>(&double_) : static_cast<const void*>(&float_);
  }

 private:
  double double_;
  float float_;
  bool wide_;
};

// For one call: the handle's math mode without sums in half precision.
class FullPrecisionSums {
 public:
  FullPrecisionSums(cublasHandle_t handle, const GemmCall& call) : handle_(handle) {
    check(cublasGetMathMode(handle, &before_), "cublasGetMathMode", call);
    const int mode = (call.allow_tf32 ? before_ : CUBLAS_DEFAULT_MATH) |
                     CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    check(cublasSetMathMode(handle, static_cast<cublasMath_t>(mode)), "cublasSetMathMode", call);
  }
  ~FullPrecisionSums() { cublasSetMathMode(handle_, before_); }
  FullPrecisionSums(const FullPrecisionSums&) = delete;
  FullPrecisionSums& operator=(const FullPrecisionSums&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

}  // namespace

void gemm(void* handle, const GemmCall& call) {
  if (call.empty()) return;
  const auto blas = static_cast<cublasHandle_t>(handle);
  const FullPrecisionSums scope(blas, call);
  const Scalar alpha(call, call.alpha), beta(call, call.beta);
  const cudaDataType_t in = data_type(call.in);
  check(cublasGemmEx(blas, operation(call.trans_a), operation(call.trans_b), call.m, call.n, call.k,
                     alpha.get(), call.a, in, call.lda, call.b, in, call.ldb, beta.get(), call.c,
                     data_type(call.out), call.ldc, compute_type(call), CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx", call);
}

void gemm_strided(void* handle, const GemmCall& call) {
  if (call.empty()) return;
  const auto blas = static_cast<cublasHandle_t>(handle);
  const FullPrecisionSums scope(blas, call);
  const Scalar alpha(call, call.alpha), beta(call, call.beta);
  const cudaDataType_t in = data_type(call.in);
  check(cublasGemmStridedBatchedEx(blas, operation(call.trans_a), operation(call.trans_b), call.m,
                                   call.n, call.k, alpha.get(), call.a, in, call.lda, call.stride_a,
                                   call.b, in, call.ldb, call.stride_b, beta.get(), call.c,
                                   data_type(call.out), call.ldc, call.stride_c, call.batch,
                                   compute_type(call), CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx", call);
}

void gemms(void* handle, const std::vector<GemmCall>& calls) {
  for (const GemmCall& call : calls) {
    if (call.batch == 1) {
      gemm(handle, call);
    } else {
      gemm_strided(handle, call);
    }
  }
}

void gemm_pointers(void* handle, const GemmCall& call) {
  if (call.empty()) return;
  const auto blas = static_cast<cublasHandle_t>(handle);
  const FullPrecisionSums scope(blas, call);
  const Scalar alpha(call, call.alpha), beta(call, call.beta);
  const cudaDataType_t in = data_type(call.in);
  const auto a = static_cast<const void* const*>(call.a);
  const auto b = static_cast<const void* const*>(call.b);
  const auto c = static_cast<void* const*>(call.c);
  check(cublasGemmBatchedEx(blas, operation(call.trans_a), operation(call.trans_b), call.m, call.n,
                            call.k, alpha.get(), a, in, call.lda, b, in, call.ldb, beta.get(), c,
                            data_type(call.out), call.ldc, call.batch, compute_type(call),
                            CUBLAS_GEMM_DEFAULT),
        "cublasGemmBatchedEx", call);
}

}  // namespace rasa_ext
