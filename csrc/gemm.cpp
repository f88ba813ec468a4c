#include "gemm.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace rasa_ext {
namespace {

std::string shape(const Matrix& matrix) {
  return "(" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.cols) + ")";
}

std::string strides(const Matrix& matrix) {
  return "strides (" + std::to_string(matrix.row_stride) + ", " +
         std::to_string(matrix.col_stride) + ") of shape " + shape(matrix);
}

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& actual) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + actual);
}

int to_int(const char* name, int64_t value) {
  if (value > std::numeric_limits<int>::max()) {
    refuse(name, "at most 2147483647", std::to_string(value));
  }
  return static_cast<int>(value);
}

// Whether each column's elements are contiguous and columns do not overlap. A stride over fewer
// than two elements has no effect.
bool is_column_major(const Matrix& matrix) {
  const bool dense = matrix.row_stride == 1 || matrix.rows <= 1;
  const bool apart = matrix.col_stride >= std::max<int64_t>(matrix.rows, 1) || matrix.cols <= 1;
  return dense && apart;
}

// Returns the distance between columns of a column-major view; cuBLAS requires at least `rows`.
int leading(const Matrix& matrix) {
  const int64_t least = std::max<int64_t>(matrix.rows, 1);
  return to_int("leading dimension", matrix.cols <= 1 ? least : matrix.col_stride);
}

struct Operand {
  bool transposed;
  int ld;
};

Operand operand(const char* name, const Matrix& matrix) {
  if (is_column_major(matrix)) return {false, leading(matrix)};
  if (is_column_major(matrix.t())) return {true, leading(matrix.t())};
  refuse(name, "rows or columns of neighbouring elements", strides(matrix));
}

// Expects a column-major D.
GemmCall by_columns(const Matrix& a, const Matrix& b, const Matrix& d, bool add, double alpha) {
  const Operand left = operand("A", a);
  const Operand right = operand("B", b);
  GemmCall call;
  call.trans_a = left.transposed;
  call.trans_b = right.transposed;
  call.m = to_int("rows of D", a.rows);
  call.n = to_int("columns of D", b.cols);
  call.k = to_int("columns of A", a.cols);
  call.alpha = alpha;
  call.add = add;
  call.a = a.data;
  call.b = b.data;
  call.c = d.data;
  call.d = d.data;
  call.lda = left.ld;
  call.ldb = right.ld;
  call.ldc = leading(d);
  call.ldd = call.ldc;
  call.in = a.dtype;
  call.out = d.dtype;
  call.batch = d.layers;
  call.stride_a = a.stride;
  call.stride_b = b.stride;
  call.stride_d = d.stride;
  return call;
}

}  // namespace

bool is_gemm_operand(const Matrix& matrix) {
  return is_column_major(matrix) || is_column_major(matrix.t());
}

bool is_addend(const Matrix& matrix) {
  const bool one_row = matrix.row_stride == 0 && (matrix.col_stride == 1 || matrix.cols <= 1);
  return one_row || is_column_major(matrix.t());
}

GemmCall multiply(const Matrix& a, const Matrix& b, const Matrix& d, bool add, double alpha) {
  if (a.cols != b.rows) refuse("B", std::to_string(a.cols) + " rows", shape(b));
  if (d.rows != a.rows || d.cols != b.cols) {
    refuse("D", "(" + std::to_string(a.rows) + ", " + std::to_string(b.cols) + ")", shape(d));
  }
  if (a.dtype != b.dtype) refuse("B", "the dtype of A", "another");
  if (d.dtype != a.dtype && d.dtype != DType::kFloat32) {
    refuse("D", "the dtype of A, or float32", "another");
  }
  // cuBLAS writes column-major results, and a row-major D is a column-major D^T = B^T A^T.
  if (is_column_major(d.t())) return by_columns(b.t(), a.t(), d.t(), add, alpha);
  operand("D", d);
  return by_columns(a, b, d, add, alpha);
}

GemmCall multiply_add(const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d) {
  if (c.data == nullptr) return multiply(a, b, d, false);
  if (c.rows != d.rows || c.cols != d.cols) refuse("C", shape(d), shape(c));
  if (c.dtype != d.dtype) refuse("C", "the dtype of D", "another");
  if (!is_addend(c)) refuse("C", "rows of neighbouring elements", strides(c));
  if (!is_column_major(d.t())) refuse("D", "rows of neighbouring elements", strides(d));
  GemmCall call = multiply(a, b, d, true);
  call.c = c.data;
  call.ldc = c.row_stride == 0 ? 0 : leading(c.t());
  return call;
}

}  // namespace rasa_ext
