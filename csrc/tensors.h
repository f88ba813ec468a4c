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
  // `first` sets the dtype and device that the other tensors must have.
  Checks(const char* op, const char* name, const Tensor& first);

  // In `sizes`, -1 stands for any size.
  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const;
  void dtype(const char* name, const Tensor& tensor) const;
  void device(const char* name, const Tensor& tensor) const;
  // Checks shape, dtype and device.
  void like(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) const;

  // Throws if `tensor` is missing. `need` names the flag that requires it.
  void given(const char* name, const std::optional<Tensor>& tensor, const char* need) const;

  // Checks for shape (size,), the integer type and the device.
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

// Returns the tensor's dtype; throws if no kernel computes in it.
DType dtype_of(const Tensor& tensor);
DType dtype_of(torch::headeronly::ScalarType dtype);

// Converts a size to the int that kernels take; throws if it does not fit.
int to_int(const char* name, int64_t size);

// Returns null if there is no tensor.
inline const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

// Views the memory of a 2-D tensor as a matrix.
Matrix matrix_of(const Tensor& tensor);

// Views a (L, rows, cols) tensor as a batch of matrices.
Matrix layers_of(const Tensor& stacked);

// Views a matrix as a tensor on the device of `like`. The tensor does not own the memory.
Tensor tensor_of(const Matrix& matrix, const Tensor& like);

// Views a contiguous row (cols,) as `rows` equal rows. The matrix has no data without a row.
Matrix repeated(const std::optional<Tensor>& row, int64_t rows);

// Returns the tensor if a GEMM can read it without a copy, else a contiguous copy.
Tensor gemm_operand(const Tensor& tensor);

// Returns the stacked tensor if it has the dtype and GEMMs can read its layers, else a copy.
Tensor batch_operand(const Tensor& stacked, DType dtype);

// Returns the tensor if it has the dtype and is contiguous, else a copy.
Tensor dense(const Tensor& tensor, DType dtype);

// Returns a view of stacked[layer].
Tensor layer_of(const Tensor& stacked, int64_t layer);

// Throws unless the argument `name` has 1 to 65535 layers, the limit of one launch, and the
// argument `other` has as many.
void check_layers(const char* op, const char* name, size_t layers, const char* other,
                  size_t others);

// Returns an uninitialised contiguous tensor on the device of `like`.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype);

// Returns at least `bytes` bytes of uninitialised memory.
Tensor empty_bytes(const Tensor& like, size_t bytes);

// Returns uninitialised uint8 of shape (bytes,).
Tensor empty_mask(const Tensor& like, int64_t bytes);

// Returns the empty tensor that an operator returns for a result that is not needed.
inline Tensor nothing(const Tensor& like, DType dtype) { return empty(like, {0}, dtype); }

void fill_zero(Tensor& tensor);

// Sets every row of layer l of y (L, M, out) to row l of rows (L, out).
void fill_rows_of_layers(Tensor& y, const Tensor& rows);

// Copies `source` to y, which has the same shape.
void copy(Tensor& y, const Tensor& source);

}  // namespace rasa_ext
