// n projections of one x: y_i = x W_i^T + bias_i + U_i Bp_i. One product computes U = x Ap^T, which
// has the columns U_i of all projections side by side. The backward has one H and one dAp.
#include <cstdint>
#include <vector>

#include "blas.h"
#include "device.h"
#include "dropout.h"
#include "ops.h"
#include "skinny.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// The first column of U for each projection, and the total number of columns.
struct Columns {
  std::vector<int64_t> first;
  int64_t total = 0;

  explicit Columns(const std::vector<Tensor>& Bp) {
    for (const Tensor& up : Bp) {
      first.push_back(total);
      total += up.size(0);
    }
  }
  Matrix of(const Matrix& U, size_t i, const Tensor& up) const {
    return U.columns(first[i], up.size(0));
  }
};

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> linear_projections(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const Tensor& Ap, const std::vector<Tensor>& Bp, const std::optional<Tensor>& mask,
    double scale) {
  const char* op = "linear_projections";
  const Checks checks(op, "x", x);
  checks.shape("x", x, {-1, -1});
  check_layers(op, "weights", weights.size(), "Bp", Bp.size());
  if (!biases.empty()) check_layers(op, "weights", weights.size(), "biases", biases.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    checks.like("weights[i]", weights[i], {-1, x.size(1)});
    checks.like("Bp[i]", Bp[i], {-1, weights[i].size(0)});
    if (!biases.empty() && biases[i].numel() > 0) {
      checks.like("biases[i]", biases[i], {weights[i].size(0)});
    }
  }
  const Columns columns(Bp);
  checks.like("Ap", Ap, {columns.total, x.size(1)});
  check_mask(checks, mask, x.numel());

  const DType dtype = dtype_of(x);
  const Device device(x);
  const Tensor U = empty(x, {x.size(0), columns.total}, dtype);
  std::vector<Tensor> y;
  for (const Tensor& weight : weights) y.push_back(empty(x, {x.size(0), weight.size(0)}, dtype));
  if (x.size(0) == 0) return {y, U};

  const Blas blas = device.blas();
  const Tensor rows = gemm_operand(x);
  const Matrix input = matrix_of(rows), inner = matrix_of(U);
  multiply_narrow(device, rows, mask, Down{Ap, inner, mask ? scale : 1}, std::nullopt);
  for (size_t i = 0; i < y.size(); ++i) {
    std::optional<Tensor> bias;
    if (!biases.empty() && biases[i].numel() > 0) bias = dense(biases[i], dtype);
    const Tensor up = gemm_operand(Bp[i]);
    gemm(blas, multiply_add(columns.of(inner, i, up), matrix_of(up), repeated(bias, x.size(0)),
                            matrix_of(y[i])));
  }
  for (size_t i = 0; i < y.size(); ++i) {
    const Tensor base = gemm_operand(weights[i]);
    gemm(blas, multiply(input, matrix_of(base).t(), matrix_of(y[i]), true));
  }
  return {y, U};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> linear_projections_backward(
    const std::vector<Tensor>& grads, const std::optional<Tensor>& x,
    const std::vector<Tensor>& weights, const std::optional<Tensor>& U, const Tensor& Ap,
    const std::vector<Tensor>& Bp, bool need_x, bool need_A, bool need_B,
    const std::optional<Tensor>& mask, double scale) {
  const char* op = "linear_projections_backward";
  check_layers(op, "grads", grads.size(), "weights", weights.size());
  check_layers(op, "grads", grads.size(), "Bp", Bp.size());
  const Tensor& like = grads[0];
  const Checks checks(op, "grads[0]", like);
  checks.shape("grads[0]", like, {-1, -1});
  checks.shape("Ap", Ap, {-1, -1});
  const int64_t tokens = like.size(0), in = Ap.size(1);
  for (size_t i = 0; i < grads.size(); ++i) {
    checks.like("grads[i]", grads[i], {tokens, -1});
    checks.like("weights[i]", weights[i], {grads[i].size(1), in});
    checks.like("Bp[i]", Bp[i], {-1, grads[i].size(1)});
  }
  const Columns columns(Bp);
  checks.like("Ap", Ap, {columns.total, in});
  if (need_A) checks.given("x", x, "need_A");
  if (need_B) checks.given("U", U, "need_B");
  if (x) checks.like("x", *x, {tokens, in});
  if (U) checks.like("U", *U, {tokens, columns.total});
  check_mask(checks, mask, tokens * in);

  const DType dtype = dtype_of(like), wide = accumulation(dtype);
  const Device device(like);
  Tensor dx = need_x ? empty(like, {tokens, in}, dtype) : nothing(like, dtype);
  Tensor dAp = need_A ? empty(like, {columns.total, in}, wide) : nothing(like, wide);
  std::vector<Tensor> dBp;
  if (need_B) {
    for (const Tensor& up : Bp) dBp.push_back(empty(like, {up.size(0), up.size(1)}, wide));
  }
  if (tokens == 0) {
    fill_zero(dAp);
    for (Tensor& grad : dBp) fill_zero(grad);
    return {dx, dAp, dBp};
  }

  const Blas blas = device.blas();
  const bool need_H = need_x || need_A;
  const Tensor H = need_H ? empty(like, {tokens, columns.total}, dtype) : nothing(like, dtype);
  std::vector<Tensor> outer;
  for (const Tensor& grad : grads) outer.push_back(gemm_operand(grad));
  const std::optional<Tensor> inner = need_B ? std::optional(gemm_operand(*U)) : std::nullopt;
  for (size_t i = 0; i < Bp.size(); ++i) {
    std::optional<Down> down;
    std::optional<Grad> up;
    if (need_H) down = Down{Bp[i], columns.of(matrix_of(H), i, Bp[i]), mask ? scale : 1};
    if (need_B) up = Grad{columns.of(matrix_of(*inner), i, Bp[i]), matrix_of(dBp[i])};
    multiply_narrow(device, outer[i], std::nullopt, down, up);
  }
  if (need_A) {
    multiply_narrow(device, *x, mask, std::nullopt, Grad{matrix_of(H), matrix_of(dAp)});
  }
  if (!need_x) return {dx, dAp, dBp};
  const Tensor down = gemm_operand(Ap);
  gemm(blas, multiply(matrix_of(H), matrix_of(down), matrix_of(dx), false));
  if (mask) keep_in_place(device, dx, *mask);
  // Each product accumulates into dx, so no separate pass over dx is needed.
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor base = gemm_operand(weights[i]);
    gemm(blas, multiply(matrix_of(outer[i]), matrix_of(base), matrix_of(dx), true));
  }
  return {dx, dAp, dBp};
}

}  // namespace rasa_ext
