// n projections of one x: y_i = x W_i^T + bias_i + U_i Bp_i with one U = x Ap^T, whose columns are
// the projections' side by side, and the backward with one H and one dAp.
#include <cstdint>
#include <vector>

#include "blas.h"
#include "device.h"
#include "dropout.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// Where each projection's columns of U begin, and how many there are in all.
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

std::vector<Tensor> gemm_operands(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> operands;
  for (const Tensor& tensor : tensors) operands.push_back(gemm_operand(tensor));
  return operands;
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> linear_projections(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const Tensor& Ap, const std::vector<Tensor>& Bp, const std::optional<Tensor>& x_dropped,
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
  check_x_dropped(checks, x_dropped, x);

  const DType dtype = dtype_of(x);
  const Device device(x);
  const Tensor U = empty(x, {x.size(0), columns.total}, dtype);
  std::vector<Tensor> y;
  for (const Tensor& weight : weights) y.push_back(empty(x, {x.size(0), weight.size(0)}, dtype));
  if (x.size(0) == 0) return {y, U};

  const Tensor rows = gemm_operand(x), seen = x_dropped ? gemm_operand(*x_dropped) : rows;
  const Tensor down = gemm_operand(Ap);
  const std::vector<Tensor> bases = gemm_operands(weights), ups = gemm_operands(Bp);
  const Matrix input = matrix_of(rows), inner = matrix_of(U);
  std::vector<std::optional<Tensor>> added(y.size());
  for (size_t i = 0; i < y.size() && !biases.empty(); ++i) {
    if (biases[i].numel() > 0) added[i] = dense(biases[i], dtype);
  }
  std::vector<GemmCall> calls{multiply(matrix_of(seen), matrix_of(down).t(), inner, false)};
  if (x_dropped) calls[0].alpha = scale;
  for (size_t i = 0; i < y.size(); ++i) {
    calls.push_back(multiply_add(columns.of(inner, i, ups[i]), matrix_of(ups[i]),
                                 repeated(added[i], x.size(0)), matrix_of(y[i])));
  }
  for (size_t i = 0; i < y.size(); ++i) {
    calls.push_back(multiply(input, matrix_of(bases[i]).t(), matrix_of(y[i]), true));
  }
  gemms(device.blas(), calls);
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

  const bool need_H = need_x || need_A;
  const Tensor H = need_H ? empty(like, {tokens, columns.total}, dtype) : nothing(like, dtype);
  const Tensor down = gemm_operand(Ap);
  const std::vector<Tensor> outer = gemm_operands(grads), ups = gemm_operands(Bp);
  const std::vector<Tensor> bases = need_x ? gemm_operands(weights) : std::vector<Tensor>{};
  std::optional<Tensor> inner, x_dropped;
  if (need_B) inner = gemm_operand(*U);
  if (need_A) x_dropped = kept_of(device, *x, mask);
  std::vector<GemmCall> calls;
  for (size_t i = 0; i < ups.size(); ++i) {
    if (need_H) {
      calls.push_back(multiply(matrix_of(outer[i]), matrix_of(ups[i]).t(),
                               columns.of(matrix_of(H), i, ups[i]), 0));
      if (mask) calls.back().alpha = scale;
    }
    if (need_B) {
      calls.push_back(multiply(columns.of(matrix_of(*inner), i, ups[i]).t(), matrix_of(outer[i]),
                               matrix_of(dBp[i]), 0));
    }
  }
  if (need_A) calls.push_back(multiply(matrix_of(H).t(), matrix_of(*x_dropped), matrix_of(dAp), 0));
  if (need_x) calls.push_back(multiply(matrix_of(H), matrix_of(down), matrix_of(dx), 0));
  gemms(device.blas(), calls);
  if (need_x && mask) keep_in_place(device, dx, *mask);
  // Every product adds to the sum of those before it: no pass over dx of its own.
  for (size_t i = 0; i < bases.size(); ++i) {
    gemm(device.blas(), multiply(matrix_of(outer[i]), matrix_of(bases[i]), matrix_of(dx), 1));
  }
  return {dx, dAp, dBp};
}

}  // namespace rasa_ext
