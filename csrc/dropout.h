// Dropout of the adapter's input, for the operators that take a mask.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "device.h"
#include "tensors.h"

namespace rasa_ext {

// Throws if the mask does not fit the `elements` elements of x. No mask is always valid.
void check_mask(const Checks& checks, const std::optional<Tensor>& mask, int64_t elements);

// Returns x with dropped elements set to 0, or all of x without a mask. A GEMM can read the result.
Tensor kept_of(const Device& device, const Tensor& x, const std::optional<Tensor>& mask);

// Sets the dropped elements of x to 0 in place; x is dense.
void keep_in_place(const Device& device, Tensor& x, const Tensor& mask);

}  // namespace rasa_ext
