// Dropout of the adapter's input, for the operators that take its mask.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "device.h"
#include "tensors.h"

namespace rasa_ext {

// A mask is for so many elements, those of x; none is always right.
void check_mask(const Checks& checks, const std::optional<Tensor>& mask, int64_t elements);

// What the mask leaves of x; all of it without a mask. A GEMM can read it.
Tensor kept_of(const Device& device, const Tensor& x, const std::optional<Tensor>& mask);

// The same where x, which is dense, stands.
void keep_in_place(const Device& device, Tensor& x, const Tensor& mask);

}  // namespace rasa_ext
