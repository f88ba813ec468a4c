// An adapted linear in two calls: pack and multiply, and the whole backward.
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {

std::tuple<Tensor, Tensor> adapted_linear(const std::optional<Tensor>& y, const Tensor& x,
                                          const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, const Tensor& A,
                                          const std::optional<Tensor>& A_pool, const Tensor& B,
                                          const std::optional<Tensor>& B_pool,
                                          const std::optional<Tensor>& d, int64_t multiple,
                                          const std::optional<Tensor>& x_dropped, double scale) {
  const Checks checks("adapted_linear", "x", x);
  if (y.has_value() == weight.has_value()) {
    checks.refuse("weight", "a tensor, or y in its place", y ? "both" : "None for both");
  }
  const auto [Ap, Bp] = pack(A, A_pool, B, B_pool, d, x.scalar_type(), multiple);
  return y ? low_rank_add(*y, x, Ap, Bp, x_dropped, scale)
           : low_rank_linear(x, *weight, bias, Ap, Bp, x_dropped, scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapted_linear_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& U, const Tensor& A, const std::optional<Tensor>& A_pool,
    const Tensor& B, const std::optional<Tensor>& B_pool, const std::optional<Tensor>& d,
    int64_t multiple, bool need_x, bool need_A, bool need_B, const std::optional<Tensor>& mask,
    double scale) {
  const auto [Ap, Bp] = pack(A, A_pool, B, B_pool, d, grad.scalar_type(), multiple);
  const auto [dx, dAp, dBp] =
      low_rank_linear_backward(grad, x, weight, U, Ap, Bp, need_x, need_A, need_B, mask, scale);
  const auto [dA, dA_pool, dB, dB_pool, dd] =
      pack_backward(need_A ? std::optional<Tensor>(dAp) : std::nullopt,
                    need_B ? std::optional<Tensor>(dBp) : std::nullopt, B, B_pool, d);
  return {dx, dA, dA_pool, dB, dB_pool, dd};
}

}  // namespace rasa_ext
