// The only three ways this library calls cuBLAS.
#pragma once

#include <vector>

#include "gemm.h"

namespace rasa_ext {

// One product.
void gemm(void* handle, const GemmCall& call);

// One after the other; those with a batch at fixed distances.
void gemms(void* handle, const std::vector<GemmCall>& calls);

// call.batch products at fixed distances.
void gemm_strided(void* handle, const GemmCall& call);

// call.batch products whose matrices are given by pointers: call.a, call.b and call.c are arrays of
// call.batch device pointers each, in device memory.
void gemm_pointers(void* handle, const GemmCall& call);

}  // namespace rasa_ext
