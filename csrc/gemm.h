// Turns views of memory into the arguments of a cuBLAS matrix product. Uses neither torch nor CUDA.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rasa_ext {

// A view of memory as a matrix: element (i, j) is data[i * row_stride + j * col_stride]. With
// several `layers` it is the first matrix of a batch; consecutive matrices are `stride` elements
// apart.
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

  // Returns `count` layers, starting at layer `first`.
  Matrix from(int64_t first, int count = 1) const {
    Matrix result = *this;
    result.data = static_cast<char*>(data) + first * stride * static_cast<int64_t>(size_of(dtype));
    result.layers = count;
    return result;
  }

  // Returns `count` columns, starting at column `first`.
  Matrix columns(int64_t first, int64_t count) const {
    char* start = static_cast<char*>(data) + first * col_stride * size_of(dtype);
    return {start, dtype, rows, count, row_stride, col_stride};
  }
};

// Whether a GEMM can read the view without a copy: the elements of each row, or of each column, are
// contiguous, and no two elements share an address.
bool is_gemm_operand(const Matrix& matrix);

// Whether a product can add the view without a copy: the elements of each row are contiguous, and
// the rows either do not overlap or are all one row (a bias).
bool is_addend(const Matrix& matrix);

// D = alpha * op(A) op(B), plus C if `add`, in cuBLAS's terms: all matrices are column-major, and
// op(A) is m x k.
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
  DType in = DType::kFloat32;   // dtype of A and B
  DType out = DType::kFloat32;  // dtype of C and D
  bool allow_tf32 = true;       // if torch's flag allows it too
  // For a batch, where C is D: distances in elements between the matrices of consecutive products.
  // Unused if a, b and d are arrays of `batch` pointers.
  int batch = 1;
  int64_t stride_a = 0, stride_b = 0, stride_d = 0;

  bool empty() const { return m == 0 || n == 0 || batch == 0; }
  bool in_place() const { return c == d; }
  bool adds_bias() const { return add && ldc == 0; }
};

// Returns the call for D (M, N) = alpha * A (M, K) B (K, N), plus D if `add`, for all layers of D.
// A and B share a dtype; D has that dtype or float32. Throws std::invalid_argument, with the
// expected and the actual value, if shapes do not match, a view is no GEMM operand, or a size
// exceeds cuBLAS's int.
GemmCall multiply(const Matrix& a, const Matrix& b, const Matrix& d, bool add, double alpha = 1);

// Returns the call for D = A B + C, or for D = A B if C has no data. C has D's shape and dtype and
// satisfies is_addend. The elements of each row of D are contiguous.
GemmCall multiply_add(const Matrix& a, const Matrix& b, const Matrix& c, const Matrix& d);

}  // namespace rasa_ext
