// A GemmCall in cuBLAS's types, for the files that call cuBLAS.
#pragma once

#include <cublas_v2.h>

#include <stdexcept>
#include <string>

#include "gemm.h"

namespace rasa_ext {

inline void check(cublasStatus_t status, const char* what, const GemmCall& call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(what) + ": expected success, got cuBLAS status " +
                           std::to_string(static_cast<int>(status)) + " for m, n, k = " +
                           std::to_string(call.m) + ", " + std::to_string(call.n) + ", " +
                           std::to_string(call.k) + " and batch " + std::to_string(call.batch));
}

inline cudaDataType_t data_type(DType dtype) {
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

inline cublasOperation_t operation(bool transposed) {
  return transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
}

// Sums run in float32, or in float64 for float64.
inline cublasComputeType_t compute_type(const GemmCall& call) {
  return call.out == DType::kFloat64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
}

// alpha or beta in the type that the compute type requires.
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

}  // namespace rasa_ext
