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

[[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& actual) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + actual);
}

int to_int(const char* name, int64_t value) {
  if (value > std::numeric_limits<int>::max()) {
    refuse(name, "at most 2147483647", std::to_string(value));
  }
  return static_cast<int>(value);
}

// Each column's elements are neighbours. A stride along one element or none says nothing.
bool is_column_major(const Matrix& matrix) {
  const bool dense = matrix.row_stride == 1 || matrix.rows <= 1;
  const bool apart = matrix.col_stride >= std::max<int64_t>(matrix.rows, 1) || matrix.cols <= 1;
  return dense && apart;
}

// The distance between columns of a column-major view, which cuBLAS wants to be at least `rows`.
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
  refuse(name, "rows or columns of neighbouring elements",
         "strides (" + std::to_string(matrix.row_stride) + ", " +
             std::to_string(matrix.col_stride) + ") of shape " + shape(matrix));
}

// C is column-major.
GemmCall by_columns(const Matrix& a, const Matrix& b, const Matrix& c, double beta, int batch,
                    int64_t stride_a, int64_t stride_b, int64_t stride_c) {
  const Operand left = operand("A", a);
  const Operand right = operand("B", b);
  GemmCall call;
  call.trans_a = left.transposed;
  call.trans_b = right.transposed;
  call.m = to_int("rows of C", a.rows);
  call.n = to_int("columns of C", b.cols);
  call.k = to_int("columns of A", a.cols);
  call.beta = beta;
  call.a = a.data;
  call.b = b.data;
  call.c = c.data;
  call.lda = left.ld;
  call.ldb = right.ld;
  call.ldc = leading(c);
  call.in = a.dtype;
  call.out = c.dtype;
  call.batch = batch;
  call.stride_a = stride_a;
  call.stride_b = stride_b;
  call.stride_c = stride_c;
  return call;
}

}  // namespace

bool is_gemm_operand(const Matrix& matrix) {
  return is_column_major(matrix) || is_column_major(matrix.t());
}

GemmCall multiply(const Matrix& a, const Matrix& b, const Matrix& c, double beta) {
  return multiply_strided(a, b, c, beta, 1, 0, 0, 0);
}

GemmCall multiply_strided(const Matrix& a, const Matrix& b, const Matrix& c, double beta, int batch,
                          int64_t stride_a, int64_t stride_b, int64_t stride_c) {
  if (a.cols != b.rows) refuse("B", std::to_string(a.cols) + " rows", shape(b));
  if (c.rows != a.rows || c.cols != b.cols) {
    refuse("C", "(" + std::to_string(a.rows) + ", " + std::to_string(b.cols) + ")", shape(c));
  }
  if (a.dtype != b.dtype) refuse("B", "the dtype of A", "another");
  if (c.dtype != a.dtype && c.dtype != DType::kFloat32) {
    refuse("C", "the dtype of A, or float32", "another");
  }
  // cuBLAS writes columns: C^T = B^T A^T has C's rows as its columns.
  if (is_column_major(c.t())) {
    return by_columns(b.t(), a.t(), c.t(), beta, batch, stride_b, stride_a, stride_c);
  }
  operand("C", c);
  return by_columns(a, b, c, beta, batch, stride_a, stride_b, stride_c);
}

}  // namespace rasa_ext
