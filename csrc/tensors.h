// Checks, views and allocation over torch's stable ABI, shared by the operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "dtype.h"
#include "gemm.h"

namespace rasa_ext {

using torch::stable::Tensor;

// The checks of one operator. Messages read "rasa_ext::op: name: expected ..., got ...".
class Checks {
 public:
  // The other tensors of a computation are held against the dtype and device of `first`.
  Checks(const char* op, const char* name, const Tensor& first);

  // sizes: -1 stands for any.
  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const;
  void dtype(const char* name, const Tensor& tensor) const;
  void device(const char* name, const Tensor& tensor) const;
  // All three.
  void like(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const;

  // `tensor` is there, as it must be where `need` says so.
  void given(const char* name, const std::optional<Tensor>& tensor, const char* need) const;

  // One row of integers of a type, on the same device.
  void integers(const char* name, const Tensor& tensor, int64_t size,
                torch::headeronly::ScalarType type) const;

  [[noreturn]] void refuse(const char* name, const std::string& expected,
                           const std::string& actual) const;

 private:
  const char* op_;
  const char* first_name_;
  int32_t dtype_;
  std::string device_;
};

// The tensor's dtype; throws where no kernel computes in it.
DType dtype_of(const Tensor& tensor);
DType dtype_of(torch::headeronly::ScalarType dtype);

// A size as kernels take it; throws where it does not fit.
int to_int(const char* name, int64_t size);

// Null where there is no tensor.
inline const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

// A 2-D tensor as it lies in memory.
Matrix matrix_of(const Tensor& tensor);

// The matrices of a (L, rows, cols) tensor.
Matrix layers_of(const Tensor& stacked);

// A matrix in memory as a tensor, on the device of `like`. It does not own the memory.
Tensor tensor_of(const Matrix& matrix, const Tensor& like);

// A row (cols,) of neighbouring elements as `rows` rows; no data without a row.
Matrix repeated(const std::optional<Tensor>& row, int64_t rows);

// The tensor if a GEMM can read it as it lies, else a contiguous copy.
Tensor gemm_operand(const Tensor& tensor);

// The stacked tensor if GEMMs can read its layers as they lie in the dtype, else a copy.
Tensor batch_operand(const Tensor& stacked, DType dtype);

// The tensor if it has the dtype and its elements lie one after the other, else a copy.
Tensor dense(const Tensor& tensor, DType dtype);

// A view of a matrix with rows and columns exchanged.
Tensor transposed(const Tensor& matrix);

// stacked[layer], a view.
Tensor layer_of(const Tensor& stacked, int64_t layer);

// A view of (L, rows, cols) as (L, cols, rows).
Tensor transposed_layers(const Tensor& stacked);

// As many layers as one launch takes, and as many in the argument `other` as in the argument
// `name`.
void check_layers(const char* op, const char* name, size_t layers, const char* other,
                  size_t others);

// Uninitialised, on the device of `like`, one row after the other.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype);

// Uninitialised memory of at least so many bytes.
Tensor empty_bytes(const Tensor& like, size_t bytes);

// Uninitialised uint8.
Tensor empty_mask(const Tensor& like, int64_t bytes);

// An operator's result where none is needed.
inline Tensor nothing(const Tensor& like, DType dtype) { return empty(like, {0}, dtype); }

void fill_zero(Tensor& tensor);

// Every row of layer l of y (L, M, out) becomes row l of rows (L, out).
void fill_rows_of_layers(Tensor& y, const Tensor& rows);

// y becomes a copy of source, of the same shape.
void copy(Tensor& y, const Tensor& source);

}  // namespace rasa_ext
