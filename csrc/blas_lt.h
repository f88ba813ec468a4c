// Single products through cublasLt. Only blas.cpp calls this.
#pragma once

#include "blas.h"

namespace rasa_ext {

// Computes D = alpha * op(A) op(B), plus C if `add`; C may be a bias, or a matrix other than D.
// Returns false if the caller must use cuBLAS instead: cublasLt has no algorithm for the call, or
// fails, or cannot add the bias. Expects m, n, k > 0 and no batch.
bool gemm_lt(const Blas& blas, const GemmCall& call);

}  // namespace rasa_ext
