// The only functions through which this library runs products on cuBLAS.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "gemm.h"

namespace rasa_ext {

// Where products run: torch's cublasHandle_t, the stream of that handle (a cudaStream_t), and any
// tensor on the device. Hidden, like torch's stable types.
struct [[gnu::visibility("hidden")]] Blas {
  void* handle;
  void* stream;
  torch::stable::Tensor like;
};

// Computes one product. If k = 0, D becomes C, or 0, without cuBLAS.
void gemm(const Blas& blas, const GemmCall& call);

// Computes call.batch products of matrices at fixed distances.
void gemm_strided(const Blas& blas, const GemmCall& call);

// Computes call.batch products, k > 0, of matrices given by pointers: call.a, call.b and call.d are
// arrays of call.batch device pointers, in device memory.
void gemm_pointers(const Blas& blas, const GemmCall& call);

}  // namespace rasa_ext
