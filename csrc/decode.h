// The low-rank product for few tokens, by the hand-written pair of kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "device.h"
#include "tensors.h"

namespace rasa_ext {

// U = x Ap^T, and y_i += U_i Bp_i with the columns of U side by side, of all outputs in two
// launches. Expects use_decode, as many y, which are dense, as Bp, and at most kDecodeOutputs.
void decode(const Device& device, const Tensor& x, const Tensor& Ap, const std::vector<Tensor>& Bp,
            const Tensor& U, const std::vector<Tensor>& y);

}  // namespace rasa_ext
