// The only ways in which this library calls cuBLAS, and where it is called.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "gemm.h"

namespace rasa_ext {

// What products run on: a cublasHandle_t of torch's, its stream (a cudaStream_t), and any tensor on
// that device. Hidden, as torch's stable types are.
struct [[gnu::visibility("hidden")]] Blas {
  void* handle;
  void* stream;
  torch::stable::Tensor like;
};

// One product. Over k = 0, D becomes C, or 0, without cuBLAS.
void gemm(const Blas& blas, const GemmCall& call);

// call.batch products at fixed distances.
void gemm_strided(const Blas& blas, const GemmCall& call);

// call.batch products, k > 0, whose matrices are given by pointers: call.a, call.b and call.d are
// arrays of call.batch device pointers each, in device memory.
void gemm_pointers(const Blas& blas, const GemmCall& call);

}  // namespace rasa_ext
