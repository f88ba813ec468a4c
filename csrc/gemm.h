// A matrix product as cuBLAS takes it, worked out from views of memory. No torch and no CUDA here.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rasa_ext {

// A view of memory as a matrix: element (i, j) is data[i * row_stride + j * col_stride]. With
// `layers` it is the first of a batch, whose matrices lie `stride` elements apart.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  int layers = 1;
  int64_t stride = 0;

  Matrix t() const { return {data, dtype, cols, rows, col_stride, row_stride, layers, stride}; }

  // `count` layers from the given one on.
  Matrix from(int64_t first, int count = 1) const {
    Matrix result = *this;
    result.data = static_cast<char*>(data) + first * stride * static_cast<int64_t>(size_of(dtype));
    result.layers = count;
    return result;
  }

  // `count` columns from the given one on.
  Matrix columns(int64_t first, int64_t count) const {
    char* start = static_cast<char*>(data) + first * col_stride * size_of(dtype);
    return {start, dtype, rows, count, row_stride, col_stride};
  }
};

// Whether a GEMM can read the view as it lies: the elements of each row, or of each column, are
// neighbours, and no two elements share a place.
bool is_gemm_operand(const Matrix& matrix);

// Whether the view can be added by a product as it lies: each row's elements are neighbours, and
// its rows lie apart, or are all one row: a bias.
bool is_addend(const Matrix& matrix);

// D = alpha * op(A) op(B), + C if `add`, in cuBLAS's terms: all column-major, op(A) is m x k.
struct GemmCall {
  bool trans_a = false, trans_b = false;
  int m = 0, n = 0, k = 0;
  double alpha = 1;
  bool add = false;
  const void* a = nullptr;
  const void* b = nullptr;
  const void* c =
      nullptr;  // D itself, or another matrix; with ldc = 0 a bias, added to all columns
  void* d = nullptr;
  int lda = 1, ldb = 1, ldc = 1, ldd = 1;
  DType in = DType::kFloat32;   // of A and B
  DType out = DType::kFloat32;  // of C and D
  bool allow_tf32 = true;       // if torch's flag does
  // For a batch, in which C is D: the distances in elements between one product's matrices and the
  // next one's. They say nothing of a batch whose a, b and d are arrays of `batch` pointers.
  int batch = 1;
  int64_t stride_a = 0, stride_b = 0, stride_d = 0;

  bool empty() const { return m == 0 || n == 0 || batch == 0; }
  bool in_place() const { return c == d; }
  bool adds_bias() const { return add && ldc == 0; }
};

// The call for D (M, N) = alpha * A (M, K) B (K, N), + D if `add`, for all layers of D. A and B
// share a dtype; D has it too or is float32. Throws std::invalid_argument, with what was expected
// and what came, where shapes do not fit, a view is no GEMM operand, or a size does not fit
// cuBLAS's int.
GemmCall multiply(const Matrix& a, const Matrix& b, const Matrix& d, bool add, double alpha = 1);

// The call for D = A B + C, or A B where C has no data. C has D's shape and dtype and is_addend;
// the elements of each of D's rows are neighbours.
GemmCall multiply_add(const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d);

}  // namespace rasa_ext
