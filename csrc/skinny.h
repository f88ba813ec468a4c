// Products of a wide matrix with narrow ones. The kernels of cuda/skinny.cuh compute them if they
// support the shapes, else cuBLAS does.
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

// C (Rp, N) = Q^T keep(S), with Q (M, Rp). C is contiguous, and float32 if S has a half type.
struct [[gnu::visibility("hidden")]] Grad {
  Matrix Q;
  Matrix C;
};

// Computes `down`, `grad` or both from S (M, N), M > 0. keep(S) is S with dropped elements set to
// 0.
void multiply_narrow(const Device& device, const Tensor& S, const std::optional<Tensor>& mask,
                     const std::optional<Down>& down, const std::optional<Grad>& grad);

}  // namespace rasa_ext
