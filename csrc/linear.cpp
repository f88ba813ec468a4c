// y = x W^T + bias + U Bt^T with U = x Ap^T, and its backward, as cuBLAS products.
#include "blas.h"
#include "device.h"
#include "dropout.h"
#include "heuristics.h"
#include "launchers.h"
#include "linear_plan.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// U = x Ap^T, y += U Bt^T, for few tokens.
void decode(const Device& device, const Tensor& x, const Tensor& Ap, const Tensor& Bt,
            const Tensor& U, const Tensor& y) {
  const DType dtype = dtype_of(x);
  const Tensor inputs[] = {dense(x, dtype), dense(Ap, dtype), dense(Bt, dtype)};
  const int tokens = to_int("tokens", x.size(0)), in = to_int("in_features", x.size(1));
  const int out = to_int("out_features", Bt.size(0)), rank = to_int("rank", Ap.size(0));
  const Tensor workspace = empty_bytes(x, decode_workspace(tokens, in, rank));
  launch_decode({inputs[0].data_ptr(), inputs[1].data_ptr(), inputs[2].data_ptr(), U.data_ptr(),
                 y.data_ptr(), workspace.data_ptr(), tokens, in, out, rank},
                dtype, device.stream());
  device.check_launch("decode");
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& Ap,
                                           const Tensor& Bt, const std::optional<Tensor>& d,
                                           const std::optional<Tensor>& mask, double scale) {
  const Checks checks("low_rank_linear", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("weight", weight, {-1, x.size(1)});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("Bt", Bt, {weight.size(0), Ap.size(0)});
  checks.no_diagonal(d);
  if (bias) checks.like("bias", *bias, {weight.size(0)});
  check_mask(checks, mask, x);

  const int64_t tokens = x.size(0);
  const DType dtype = dtype_of(x);
  const Device device(x);
  Tensor y = empty(x, {tokens, weight.size(0)}, dtype);
  Tensor U = empty(x, {tokens, Ap.size(0)}, dtype);
  if (tokens == 0) return {y, U};
  if (bias) fill_rows(y, *bias);
  const Tensor rows = gemm_operand(x), base = gemm_operand(weight);
  if (!mask && use_decode(tokens, Ap.size(0), dtype)) {
    const Matrix result = matrix_of(y);
    gemm(device.blas(), multiply(matrix_of(rows), matrix_of(base).t(), result, bias ? 1 : 0));
    decode(device, x, Ap, Bt, U, y);
    return {y, U};
  }
  const Tensor down = gemm_operand(Ap), up = gemm_operand(Bt), kept = kept_of(device, rows, mask);
  gemms(device.blas(), plan_forward({matrix_of(rows), matrix_of(kept), matrix_of(base),
                                     matrix_of(down), matrix_of(up), matrix_of(U), matrix_of(y),
                                     bias.has_value(), mask ? scale : 1}));
  return {y, U};
}

std::tuple<Tensor, Tensor> low_rank_add(const Tensor& y, const Tensor& x, const Tensor& Ap,
                                        const Tensor& Bt, const std::optional<Tensor>& d,
                                        const std::optional<Tensor>& mask, double scale) {
  const Checks checks("low_rank_add", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("y", y, {x.size(0), -1});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("Bt", Bt, {y.size(1), Ap.size(0)});
  checks.no_diagonal(d);
  check_mask(checks, mask, x);

  const DType dtype = dtype_of(x);
  const Device device(x);
  Tensor out = empty(x, {y.size(0), y.size(1)}, dtype);
  Tensor U = empty(x, {x.size(0), Ap.size(0)}, dtype);
  if (x.size(0) == 0) return {out, U};
  copy(out, y);
  if (!mask && use_decode(x.size(0), Ap.size(0), dtype)) {
    decode(device, x, Ap, Bt, U, out);
    return {out, U};
  }
  const Tensor kept = kept_of(device, x, mask);
  const Tensor down = gemm_operand(Ap), up = gemm_operand(Bt);
  gemms(device.blas(),
        plan_forward({Matrix{}, matrix_of(kept), Matrix{}, matrix_of(down), matrix_of(up),
                      matrix_of(U), matrix_of(out), true, mask ? scale : 1}));
  return {out, U};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_linear_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& U,
    const Tensor& Ap, const Tensor& Bt, const std::optional<Tensor>& d, bool need_x,
    bool need_adapter, const std::optional<Tensor>& mask, double scale) {
  const Checks checks("low_rank_linear_backward", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("grad", grad, {x.size(0), -1});
  if (weight) checks.like("weight", *weight, {grad.size(1), x.size(1)});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("U", U, {x.size(0), Ap.size(0)});
  checks.like("Bt", Bt, {grad.size(1), Ap.size(0)});
  checks.no_diagonal(d);
  check_mask(checks, mask, x);

  const DType dtype = dtype_of(x), wide = accumulation(dtype);
  const int64_t tokens = x.size(0), rank = Ap.size(0);
  const Device device(x);
  Tensor dx = need_x ? empty(x, {tokens, x.size(1)}, dtype) : nothing(x, dtype);
  Tensor dAp = need_adapter ? empty(x, {rank, x.size(1)}, wide) : nothing(x, wide);
  // By columns: each rank's gradient lies together, the order in which a pool's are summed.
  Tensor dBt = need_adapter ? empty_by_columns(x, grad.size(1), rank, wide) : nothing(x, wide);
  const Tensor dd = nothing(x, wide);
  if (tokens == 0 && need_adapter) {
    fill_zero(dAp);
    fill_zero(dBt);
  }
  if (tokens == 0 || !(need_x || need_adapter)) return {dx, dAp, dBt, dd};

  Tensor H = empty(x, {tokens, rank}, dtype);
  const Tensor outer = gemm_operand(grad), inner = gemm_operand(U);
  const Tensor down = gemm_operand(Ap), up = gemm_operand(Bt);
  LinearBackward backward;
  backward.grad = matrix_of(outer);
  backward.U = matrix_of(inner);
  backward.Ap = matrix_of(down);
  backward.Bt = matrix_of(up);
  backward.H = matrix_of(H);
  backward.scale = mask ? scale : 1;
  if (need_x) backward.dx = matrix_of(dx);
  std::optional<Tensor> kept;
  if (need_adapter) {
    kept = kept_of(device, x, mask);
    backward.kept = matrix_of(*kept);
    backward.dAp = matrix_of(dAp);
    backward.dBt = matrix_of(dBt);
  }
  gemms(device.blas(), plan_backward(backward));
  if (need_x && mask) keep_in_place(device, dx, *mask);
  if (need_x && weight) {
    const Tensor base = gemm_operand(*weight);
    gemm(device.blas(), multiply(matrix_of(outer), matrix_of(base), matrix_of(dx), 1));
  }
  return {dx, dAp, dBt, dd};
}

}  // namespace rasa_ext
