// y = x W^T + bias + U Bp with U = x Ap^T, and its backward, as cuBLAS products.
#include "blas.h"
#include "decode.h"
#include "device.h"
#include "dropout.h"
#include "heuristics.h"
#include "linear_plan.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& Ap,
                                           const Tensor& Bp, const std::optional<Tensor>& x_dropped,
                                           double scale) {
  const Checks checks("low_rank_linear", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("weight", weight, {-1, x.size(1)});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("Bp", Bp, {Ap.size(0), weight.size(0)});
  if (bias) checks.like("bias", *bias, {weight.size(0)});
  check_x_dropped(checks, x_dropped, x);

  const int64_t tokens = x.size(0);
  const DType dtype = dtype_of(x);
  const Device device(x);
  Tensor y = empty(x, {tokens, weight.size(0)}, dtype);
  Tensor U = empty(x, {tokens, Ap.size(0)}, dtype);
  if (tokens == 0) return {y, U};
  const std::optional<Tensor> row = bias ? std::optional(dense(*bias, dtype)) : std::nullopt;
  const Matrix addend = repeated(row, tokens), result = matrix_of(y);
  const Tensor rows = gemm_operand(x), base = gemm_operand(weight);
  if (!x_dropped && use_decode(tokens, Ap.size(0), dtype)) {
    gemm(device.blas(), multiply_add(matrix_of(rows), matrix_of(base).t(), addend, result));
    decode(device, x, Ap, Bp, U, y);
    return {y, U};
  }
  const Tensor down = gemm_operand(Ap), up = gemm_operand(Bp);
  const Tensor seen = x_dropped ? gemm_operand(*x_dropped) : rows;
  gemms(device.blas(),
        plan_forward({matrix_of(rows), matrix_of(seen), matrix_of(base), matrix_of(down),
                      matrix_of(up), matrix_of(U), addend, result, x_dropped ? scale : 1}));
  return {y, U};
}

std::tuple<Tensor, Tensor> low_rank_add(const Tensor& y, const Tensor& x, const Tensor& Ap,
                                        const Tensor& Bp, const std::optional<Tensor>& x_dropped,
                                        double scale) {
  const Checks checks("low_rank_add", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("y", y, {x.size(0), -1});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("Bp", Bp, {Ap.size(0), y.size(1)});
  check_x_dropped(checks, x_dropped, x);

  const DType dtype = dtype_of(x);
  const Device device(x);
  Tensor out = empty(x, {y.size(0), y.size(1)}, dtype);
  Tensor U = empty(x, {x.size(0), Ap.size(0)}, dtype);
  if (x.size(0) == 0) return {out, U};
  const Matrix result = matrix_of(out);
  if (!x_dropped && use_decode(x.size(0), Ap.size(0), dtype)) {
    copy(out, y);
    decode(device, x, Ap, Bp, U, out);
    return {out, U};
  }
  Matrix addend = matrix_of(y);
  if (!is_addend(addend)) {
    copy(out, y);
    addend = result;
  }
  const Tensor seen = gemm_operand(x_dropped ? *x_dropped : x);
  const Tensor down = gemm_operand(Ap), up = gemm_operand(Bp);
  gemms(device.blas(),
        plan_forward({Matrix{}, matrix_of(seen), Matrix{}, matrix_of(down), matrix_of(up),
                      matrix_of(U), addend, result, x_dropped ? scale : 1}));
  return {out, U};
}

std::tuple<Tensor, Tensor, Tensor> low_rank_linear_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& U, const Tensor& Ap, const Tensor& Bp, bool need_x, bool need_A,
    bool need_B, const std::optional<Tensor>& mask, double scale) {
  const Checks checks("low_rank_linear_backward", "grad", grad);
  checks.shape("grad", grad, {-1, -1});
  checks.like("Ap", Ap, {-1, -1});
  const int64_t tokens = grad.size(0), out = grad.size(1), rank = Ap.size(0), in = Ap.size(1);
  checks.like("Bp", Bp, {rank, out});
  if (need_A) checks.given("x", x, "need_A");
  if (need_B) checks.given("U", U, "need_B");
  if (x) checks.like("x", *x, {tokens, in});
  if (U) checks.like("U", *U, {tokens, rank});
  if (weight) checks.like("weight", *weight, {out, in});
  check_mask(checks, mask, tokens * in);

  const DType dtype = dtype_of(grad), wide = accumulation(dtype);
  const Device device(grad);
  Tensor dx = need_x ? empty(grad, {tokens, in}, dtype) : nothing(grad, dtype);
  Tensor dAp = need_A ? empty(grad, {rank, in}, wide) : nothing(grad, wide);
  Tensor dBp = need_B ? empty(grad, {rank, out}, wide) : nothing(grad, wide);
  if (tokens == 0) {
    fill_zero(dAp);
    fill_zero(dBp);
    return {dx, dAp, dBp};
  }
  const Tensor outer = gemm_operand(grad), down = gemm_operand(Ap), up = gemm_operand(Bp);
  std::optional<Tensor> x_dropped, inner, H;
  LinearBackward backward;
  backward.grad = matrix_of(outer);
  backward.Ap = matrix_of(down);
  backward.Bp = matrix_of(up);
  backward.scale = mask ? scale : 1;
  if (need_x || need_A) {
    H = empty(grad, {tokens, rank}, dtype);
    backward.H = matrix_of(*H);
  }
  if (need_x) backward.dx = matrix_of(dx);
  if (need_A) {
    x_dropped = kept_of(device, *x, mask);
    backward.x_dropped = matrix_of(*x_dropped);
    backward.dAp = matrix_of(dAp);
  }
  if (need_B) {
    inner = gemm_operand(*U);
    backward.U = matrix_of(*inner);
    backward.dBp = matrix_of(dBp);
  }
  gemms(device.blas(), plan_backward(backward));
  if (need_x && mask) keep_in_place(device, dx, *mask);
  if (need_x && weight) {
    const Tensor base = gemm_operand(*weight);
    gemm(device.blas(), multiply(matrix_of(outer), matrix_of(base), matrix_of(dx), true));
  }
  return {dx, dAp, dBp};
}

}  // namespace rasa_ext
