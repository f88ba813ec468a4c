// The low-rank product for few tokens, by the hand-written pair of kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "device.h"
#include "tensors.h"

namespace rasa_ext {

// U = x Ap^T and y += U Bp in two launches. Expects use_decode; U and y are dense.
void decode(const Device& device, const Tensor& x, const Tensor& Ap, const Tensor& Bp,
            const Tensor& U, const Tensor& y);

}  // namespace rasa_ext
