// The low-rank linear and the backward, with M tokens and Rp the padded rank:
//
//     U = X Ap^T      Y   = U Bp + C         Y   += X W^T
//     H = G Bp^T      dBp = U^T G            dAp  = H^T X      dX = H Ap      dX += G W
//
// C is the bias or nothing. In low_rank_add, C is the base's output and X W^T is not added.
//
// The skinny kernels (skinny.h) compute products with one narrow side and no sum over Rp. cuBLAS
// computes all others.
//
// With dropout, the X beside Ap is masked, the products that give U and H are scaled, and dX is
// masked before the last product.
//
// The adapter's product comes first and the base's last, with beta = 1: the large product hides the
// extra read of Y, and Y is rounded once. The bias is added in the adapter's product, because
// cuBLAS adds a bias best to a product that adds nothing else. In the backward, each product
// follows one that reads the same matrix: H and dBp come from one read of G if possible, and dX is
// still in cache for the base's product.
#include "blas.h"
#include "device.h"
#include "dropout.h"
#include "heuristics.h"
#include "launchers.h"
#include "ops.h"
#include "skinny.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// Computes U = scale * keep(X) Ap^T and Y = U Bp + C.
void multiply_adapter(const Device& device, const Blas& blas, const Tensor& x,
                      const std::optional<Tensor>& mask, double scale, const Tensor& Ap,
                      const Tensor& Bp, const Matrix& C, const Tensor& U, const Tensor& y) {
  multiply_narrow(device, x, mask, Down{Ap, matrix_of(U), mask ? scale : 1}, std::nullopt);
  const Tensor up = gemm_operand(Bp);
  gemm(blas, multiply_add(matrix_of(U), matrix_of(up), C, matrix_of(y)));
}

// Computes U = X Ap^T and Y += U Bp with the decode kernels. Expects use_decode to be true.
void decode(const Device& device, const Tensor& x, const Tensor& Ap, const Tensor& Bp,
            const Tensor& U, const Tensor& y) {
  const DType dtype = dtype_of(x);
  const Tensor tokens = dense(x, dtype), down = dense(Ap, dtype), up = dense(Bp, dtype);
  const int M = to_int("tokens", x.size(0)), in = to_int("in_features", x.size(1));
  const int out = to_int("out_features", Bp.size(1)), rank = to_int("rank", Ap.size(0));
  const Tensor workspace = empty_bytes(x, decode_workspace(M, in, rank));
  launch_decode({tokens.data_ptr(), down.data_ptr(), up.data_ptr(), U.data_ptr(), y.data_ptr(),
                 workspace.data_ptr(), M, in, out, rank},
                dtype, device.stream());
  device.check_launch("decode");
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& Ap,
                                           const Tensor& Bp, const std::optional<Tensor>& mask,
                                           double scale) {
  const Checks checks("low_rank_linear", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("weight", weight, {-1, x.size(1)});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("Bp", Bp, {Ap.size(0), weight.size(0)});
  if (bias) checks.like("bias", *bias, {weight.size(0)});
  check_mask(checks, mask, x.numel());

  const int64_t tokens = x.size(0);
  const DType dtype = dtype_of(x);
  const Device device(x);
  const Tensor y = empty(x, {tokens, weight.size(0)}, dtype);
  const Tensor U = empty(x, {tokens, Ap.size(0)}, dtype);
  if (tokens == 0) return {y, U};
  const Blas blas = device.blas();
  const std::optional<Tensor> row = bias ? std::optional(dense(*bias, dtype)) : std::nullopt;
  const Matrix addend = repeated(row, tokens), result = matrix_of(y);
  const Tensor rows = gemm_operand(x), base = gemm_operand(weight);
  if (!mask && use_decode(tokens, Ap.size(0), dtype)) {
    gemm(blas, multiply_add(matrix_of(rows), matrix_of(base).t(), addend, result));
    decode(device, x, Ap, Bp, U, y);
    return {y, U};
  }
  multiply_adapter(device, blas, rows, mask, scale, Ap, Bp, addend, U, y);
  gemm(blas, multiply(matrix_of(rows), matrix_of(base).t(), result, true));
  return {y, U};
}

std::tuple<Tensor, Tensor> low_rank_add(const Tensor& y, const Tensor& x, const Tensor& Ap,
                                        const Tensor& Bp, const std::optional<Tensor>& mask,
                                        double scale) {
  const Checks checks("low_rank_add", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.like("y", y, {x.size(0), -1});
  checks.like("Ap", Ap, {-1, x.size(1)});
  checks.like("Bp", Bp, {Ap.size(0), y.size(1)});
  check_mask(checks, mask, x.numel());

  const DType dtype = dtype_of(x);
  const Device device(x);
  Tensor out = empty(x, {y.size(0), y.size(1)}, dtype);
  const Tensor U = empty(x, {x.size(0), Ap.size(0)}, dtype);
  if (x.size(0) == 0) return {out, U};
  const bool few = !mask && use_decode(x.size(0), Ap.size(0), dtype);
  const bool copied = few || !is_addend(matrix_of(y));
  if (copied) copy(out, y);
  if (few) {
    decode(device, x, Ap, Bp, U, out);
  } else {
    multiply_adapter(device, device.blas(), x, mask, scale, Ap, Bp, matrix_of(copied ? out : y), U,
                     out);
  }
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
  const Blas blas = device.blas();
  const Tensor outer = gemm_operand(grad);
  const bool need_H = need_x || need_A;
  const Tensor H = need_H ? empty(grad, {tokens, rank}, dtype) : nothing(grad, dtype);
  const std::optional<Tensor> inner = need_B ? std::optional(gemm_operand(*U)) : std::nullopt;
  std::optional<Down> down;
  std::optional<Grad> up;
  if (need_H) down = Down{Bp, matrix_of(H), mask ? scale : 1};
  if (need_B) up = Grad{matrix_of(*inner), matrix_of(dBp)};
  multiply_narrow(device, outer, std::nullopt, down, up);
  if (need_A) {
    multiply_narrow(device, *x, mask, std::nullopt, Grad{matrix_of(H), matrix_of(dAp)});
  }
  if (need_x) {
    const Tensor inner_down = gemm_operand(Ap);
    gemm(blas, multiply(matrix_of(H), matrix_of(inner_down), matrix_of(dx), false));
    if (mask) keep_in_place(device, dx, *mask);
    if (weight) {
      const Tensor base = gemm_operand(*weight);
      gemm(blas, multiply(matrix_of(outer), matrix_of(base), matrix_of(dx), true));
    }
  }
  return {dx, dAp, dBp};
}

}  // namespace rasa_ext
