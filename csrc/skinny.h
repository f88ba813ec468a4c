// The products of a wide matrix with narrow ones, by the kernels of cuda/skinny.cuh where they take
// the shapes, else by cuBLAS.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "device.h"
#include "tensors.h"

namespace rasa_ext {

// D (M, Rp) = scale * keep(S) P^T, with P (Rp, N).
struct [[gnu::visibility("hidden")]] Down {
  Tensor P;
  Matrix D;
  double scale;
};

// C (Rp, N) = Q^T keep(S), with Q (M, Rp); C is contiguous, and float32 where S is of a half type.
struct [[gnu::visibility("hidden")]] Grad {
  Matrix Q;
  Matrix C;
};

// Whichever are given, from S (M, N), M > 0, of which `mask` leaves keep(S).
void multiply_narrow(const Device& device, const Tensor& S, const std::optional<Tensor>& mask,
                     const std::optional<Down>& down, const std::optional<Grad>& grad);

}  // namespace rasa_ext
