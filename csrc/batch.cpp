#include "batch.h"

#include <algorithm>
#include <cstdint>

namespace rasa_ext {
namespace {

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

Batch Batch::from(int64_t layer) const {
  Batch result = *this;
  result.first.data =
      static_cast<char*>(first.data) + layer * stride * static_cast<int64_t>(size_of(first.dtype));
  return result;
}

Batch layers_of(const Tensor& stacked) {
  return {matrix_of(layer_of(stacked, 0)), stacked.stride(0)};
}

Tensor batch_operand(const Tensor& stacked, DType dtype) {
  const bool usable =
      dtype_of(stacked) == dtype && is_gemm_operand(matrix_of(layer_of(stacked, 0)));
  return usable ? stacked : dense(stacked, dtype);
}

GemmCall multiply(const Batch& a, const Batch& b, const Batch& d, bool add, int layers) {
  return multiply_strided(a.first, b.first, d.first, add, layers, a.stride, b.stride, d.stride);
}

bool lie_alike(const std::vector<Tensor>& matrices) {
  const Matrix first = matrix_of(matrices[0]);
  return is_gemm_operand(first) &&
         std::all_of(matrices.begin(), matrices.end(), [&](const Tensor& matrix) {
           return matrix.stride(0) == first.row_stride && matrix.stride(1) == first.col_stride &&
                  is_aligned(matrix.data_ptr());
         });
}

bool is_aligned(const Batch& batch, int layers) {
  return is_aligned(batch.first.data) && (layers == 1 || is_aligned(batch.from(1).first.data));
}

Scattered scattered(const std::vector<Tensor>& matrices) {
  Scattered result{matrix_of(matrices[0]), {}};
  for (const Tensor& matrix : matrices) result.pointers.push_back(matrix.data_ptr());
  return result;
}

Scattered scattered(const Batch& batch, int layers) {
  Scattered result{batch.first, {}};
  for (int i = 0; i < layers; ++i) result.pointers.push_back(batch.from(i).first.data);
  return result;
}

GemmCall multiply(const Device& device, const Tensor& on, const Scattered& a, const Scattered& b,
                  const Scattered& d, bool add, std::optional<Tensor>& table) {
  if (a.like.cols == 0) {  // a sum over nothing: no product, and only here are D's pointers at hand
    for (size_t i = 0; i < d.pointers.size() && !add; ++i) {
      Matrix result = d.like;
      result.data = d.pointers[i];
      Tensor zeros = tensor_of(result, on);
      fill_zero(zeros);
    }
    return {};
  }
  std::vector<void*> pointers;  // three arrays, one after the other
  for (const Scattered* each : {&a, &b, &d}) {
    pointers.insert(pointers.end(), each->pointers.begin(), each->pointers.end());
  }
  table = device.upload(on, pointers.data(), pointers.size() * sizeof(void*));
  Matrix left = a.like, right = b.like, result = d.like;
  left.data = table->data_ptr();
  right.data = static_cast<void**>(left.data) + a.pointers.size();
  result.data = static_cast<void**>(right.data) + b.pointers.size();
  GemmCall call = multiply(left, right, result, add);
  call.batch = static_cast<int>(a.pointers.size());
  return call;
}

}  // namespace rasa_ext
