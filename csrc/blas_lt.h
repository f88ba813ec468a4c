// Single products through cublasLt. For blas.cpp alone.
#pragma once

#include "blas.h"

namespace rasa_ext {

// D = alpha * op(A) op(B), + C if `add`; C may be another matrix than D, or a bias. False, and
// nothing is done, where cublasLt has no algorithm for the call. Expects m, n, k > 0 and no batch.
bool gemm_lt(const Blas& blas, const GemmCall& call);

}  // namespace rasa_ext
