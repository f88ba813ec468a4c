// Layers that read one x, n of them: y_i = x W_i^T + bias_i + U_i Bt_i^T with one U = x Ap^T, whose
// columns are the siblings' side by side, and the backward with one H and one dAp.
#include <cstdint>
#include <utility>
#include <vector>

#include "blas.h"
#include "device.h"
#include "heuristics.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// Where each sibling's columns of U begin, and how many there are in all.
struct Columns {
  std::vector<int64_t> first;
  int64_t total = 0;

  explicit Columns(const std::vector<Tensor>& Bt) {
    for (const Tensor& up : Bt) {
      first.push_back(total);
      total += up.size(1);
    }
  }
  Matrix of(const Matrix& U, size_t i, const Tensor& up) const {
    return U.columns(first[i], up.size(1));
  }
};

std::vector<Tensor> gemm_operands(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> operands;
  for (const Tensor& tensor : tensors) operands.push_back(gemm_operand(tensor));
  return operands;
}

bool lie_alike(const Matrix& a, const Matrix& b) {
  return a.rows == b.rows && a.cols == b.cols && a.row_stride == b.row_stride &&
         a.col_stride == b.col_stride;
}

// Two siblings whose base products are one call; `second` == `first` stands for one alone.
struct Pair {
  size_t first, second;
};

// Neighbours of equal shape are a pair where that fills the device better. Its first has the lower
// address of weights, and is given the lower one of results: two matrices anywhere in memory then
// lie at a fixed distance that is not negative.
std::vector<Pair> pair_up(const Matrix& x, const std::vector<Tensor>& weights,
                          std::vector<Tensor>& y) {
  std::vector<Pair> pairs;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Matrix weight = matrix_of(weights[i]);
    if (i + 1 == weights.size() || !batch_siblings(x.rows, weight.rows) ||
        !lie_alike(weight, matrix_of(weights[i + 1]))) {
      pairs.push_back({i, i});
      continue;
    }
    const bool ascending = weights[i].data_ptr() <= weights[i + 1].data_ptr();
    const Pair pair = ascending ? Pair{i, i + 1} : Pair{i + 1, i};
    if (y[pair.first].data_ptr() > y[pair.second].data_ptr()) std::swap(y[i], y[i + 1]);
    pairs.push_back(pair);
    ++i;
  }
  return pairs;
}

int64_t distance(const Matrix& from, const Matrix& to) {
  const int64_t bytes = static_cast<char*>(to.data) - static_cast<char*>(from.data);
  return bytes / static_cast<int64_t>(size_of(from.dtype));
}

// y_i += x W_i^T of one or both.
GemmCall add_base(const Matrix& x, const Pair& pair, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& y) {
  const Matrix weight = matrix_of(weights[pair.first]), result = matrix_of(y[pair.first]);
  if (pair.first == pair.second) return multiply(x, weight.t(), result, 1);
  return multiply_strided(x, weight.t(), result, 1, 2, 0,
                          distance(weight, matrix_of(weights[pair.second])),
                          distance(result, matrix_of(y[pair.second])));
}

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> siblings_linear(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const Tensor& Ap, const std::vector<Tensor>& Bt, const std::optional<Tensor>& d) {
  const char* op = "siblings_linear";
  const Checks checks(op, "x", x);
  checks.shape("x", x, {-1, -1});
  check_layers(op, weights.size(), Bt.size());
  if (!biases.empty()) check_layers(op, weights.size(), biases.size());
  const Columns columns(Bt);
  checks.like("Ap", Ap, {columns.total, x.size(1)});
  checks.no_diagonal(d);
  for (size_t i = 0; i < weights.size(); ++i) {
    checks.like("weights[i]", weights[i], {-1, x.size(1)});
    checks.like("Bt[i]", Bt[i], {weights[i].size(0), -1});
    if (!biases.empty() && biases[i].numel() > 0) {
      checks.like("biases[i]", biases[i], {weights[i].size(0)});
    }
  }

  const DType dtype = dtype_of(x);
  const Device device(x);
  const Tensor U = empty(x, {x.size(0), columns.total}, dtype);
  std::vector<Tensor> y;
  for (const Tensor& weight : weights) y.push_back(empty(x, {x.size(0), weight.size(0)}, dtype));
  if (x.size(0) == 0) return {y, U};

  const Tensor rows = gemm_operand(x), down = gemm_operand(Ap);
  const std::vector<Tensor> bases = gemm_operands(weights), ups = gemm_operands(Bt);
  const Matrix input = matrix_of(rows), inner = matrix_of(U);
  const std::vector<Pair> pairs = pair_up(input, bases, y);
  std::vector<GemmCall> calls = {multiply(input, matrix_of(down).t(), inner, 0)};
  for (size_t i = 0; i < y.size(); ++i) {
    const bool bias = !biases.empty() && biases[i].numel() > 0;
    if (bias) fill_rows(y[i], biases[i]);
    calls.push_back(multiply(columns.of(inner, i, ups[i]), matrix_of(ups[i]).t(), matrix_of(y[i]),
                             bias ? 1 : 0));
  }
  for (const Pair& pair : pairs) calls.push_back(add_base(input, pair, bases, y));
  gemms(device.blas(), calls);
  return {y, U};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor> siblings_linear_backward(
    const std::vector<Tensor>& grads, const Tensor& x, const std::vector<Tensor>& weights,
    const Tensor& U, const Tensor& Ap, const std::vector<Tensor>& Bt,
    const std::optional<Tensor>& d, bool need_x, bool need_adapter) {
  const char* op = "siblings_linear_backward";
  const Checks checks(op, "x", x);
  checks.shape("x", x, {-1, -1});
  check_layers(op, grads.size(), weights.size());
  check_layers(op, grads.size(), Bt.size());
  const Columns columns(Bt);
  checks.like("Ap", Ap, {columns.total, x.size(1)});
  checks.like("U", U, {x.size(0), columns.total});
  checks.no_diagonal(d);
  for (size_t i = 0; i < grads.size(); ++i) {
    checks.like("grads[i]", grads[i], {x.size(0), -1});
    checks.like("weights[i]", weights[i], {grads[i].size(1), x.size(1)});
    checks.like("Bt[i]", Bt[i], {grads[i].size(1), -1});
  }

  const DType dtype = dtype_of(x), wide = accumulation(dtype);
  const int64_t tokens = x.size(0);
  const Device device(x);
  const Tensor dx = need_x ? empty(x, {tokens, x.size(1)}, dtype) : nothing(x, dtype);
  Tensor dAp = need_adapter ? empty(x, {columns.total, x.size(1)}, wide) : nothing(x, wide);
  std::vector<Tensor> dBt;
  if (need_adapter) {
    for (const Tensor& up : Bt) {
      dBt.push_back(empty_by_columns(x, up.size(0), up.size(1), wide));
    }
  }
  const Tensor dd = nothing(x, wide);
  if (tokens == 0 && need_adapter) {
    fill_zero(dAp);
    for (Tensor& grad : dBt) fill_zero(grad);
  }
  if (tokens == 0 || !(need_x || need_adapter)) return {dx, dAp, dBt, dd};

  const Tensor H = empty(x, {tokens, columns.total}, dtype);
  const Tensor rows = gemm_operand(x), inner = gemm_operand(U), down = gemm_operand(Ap);
  const std::vector<Tensor> outer = gemm_operands(grads), ups = gemm_operands(Bt);
  const std::vector<Tensor> bases = need_x ? gemm_operands(weights) : std::vector<Tensor>{};
  std::vector<GemmCall> calls;
  for (size_t i = 0; i < ups.size(); ++i) {
    calls.push_back(
        multiply(matrix_of(outer[i]), matrix_of(ups[i]), columns.of(matrix_of(H), i, ups[i]), 0));
  }
  if (need_x) {
    // Every product adds to the sum of those before it: no pass over dx of its own.
    calls.push_back(multiply(matrix_of(H), matrix_of(down), matrix_of(dx), 0));
    for (size_t i = 0; i < bases.size(); ++i) {
      calls.push_back(multiply(matrix_of(outer[i]), matrix_of(bases[i]), matrix_of(dx), 1));
    }
  }
  if (need_adapter) {
    calls.push_back(multiply(matrix_of(H).t(), matrix_of(rows), matrix_of(dAp), 0));
    for (size_t i = 0; i < ups.size(); ++i) {
      calls.push_back(multiply(matrix_of(outer[i]).t(), columns.of(matrix_of(inner), i, ups[i]),
                               matrix_of(dBt[i]), 0));
    }
  }
  gemms(device.blas(), calls);
  return {dx, dAp, dBt, dd};
}

}  // namespace rasa_ext
