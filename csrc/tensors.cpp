#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

namespace rasa_ext {
namespace {

int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

int32_t raw_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float32();
  }
}

std::string name_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  return "dtype number " + std::to_string(dtype);
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another:") + std::to_string(tensor.get_device_index());
}

// Returns "(3, 4)", with * for any size.
template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) {
    text += (text.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  }
  return "(" + text + ")";
}

// Returns torch's strides of a contiguous tensor: a size of 0 counts as 1.
std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

int32_t device_type_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type_of(like),
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

// Views the memory of `tensor`, starting `offset` elements after the first.
Tensor view_of(const Tensor& tensor, const std::vector<int64_t>& sizes,
               const std::vector<int64_t>& strides, int64_t offset) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), offset, &view));
  return Tensor(view);
}

}  // namespace

Checks::Checks(const char* op, const char* name, const Tensor& first)
    : op_(op), first_name_(name), dtype_(raw_dtype(first)), device_(device_name(first)) {}

void Checks::given(const char* name, const std::optional<Tensor>& tensor, const char* need) const {
  if (!tensor) refuse(name, std::string("a tensor with ") + need, "None");
}

void Checks::refuse(const char* name, const std::string& expected,
                    const std::string& actual) const {
  throw std::runtime_error("rasa_ext::" + std::string(op_) + ": " + name + ": expected " +
                           expected + ", got " + actual + ".");
}

void Checks::shape(const char* name, const Tensor& tensor,
                   std::initializer_list<int64_t> sizes) const {
  const auto actual = tensor.sizes();
  bool same = actual.size() == sizes.size();
  size_t i = 0;
  for (const int64_t size : sizes) {
    same = same && (size < 0 || size == actual[i]);
    ++i;
  }
  if (!same) refuse(name, "shape " + text_of(sizes), "shape " + text_of(actual));
}

void Checks::dtype(const char* name, const Tensor& tensor) const {
  const int32_t actual = raw_dtype(tensor);
  if (actual != dtype_) {
    refuse(name, "the dtype of " + std::string(first_name_) + ", " + name_of(dtype_),
           name_of(actual));
  }
}

void Checks::device(const char* name, const Tensor& tensor) const {
  const std::string actual = device_name(tensor);
  if (actual != device_) {
    refuse(name, "the device of " + std::string(first_name_) + ", " + device_, actual);
  }
}

void Checks::integers(const char* name, const Tensor& tensor, int64_t size,
                      torch::headeronly::ScalarType type) const {
  shape(name, tensor, {size});
  const auto actual = tensor.scalar_type();
  if (actual != type) {
    refuse(name, torch::headeronly::toString(type), torch::headeronly::toString(actual));
  }
  device(name, tensor);
}

void Checks::like(const char* name, const Tensor& tensor,
                  std::initializer_list<int64_t> sizes) const {
  shape(name, tensor, sizes);
  dtype(name, tensor);
  device(name, tensor);
}

DType dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

DType dtype_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      throw std::runtime_error(
          std::string("rasa_ext: dtype: expected float32, float64, float16 or bfloat16, got ") +
          torch::headeronly::toString(dtype) + ".");
  }
}

int to_int(const char* name, int64_t size) {
  if (size > std::numeric_limits<int>::max()) {
    throw std::runtime_error("rasa_ext: " + std::string(name) +
                             ": expected at most 2147483647, got " + std::to_string(size) + ".");
  }
  return static_cast<int>(size);
}

Matrix matrix_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  return {tensor.data_ptr(), dtype_of(tensor), sizes[0], sizes[1], strides[0], strides[1]};
}

Matrix layers_of(const Tensor& stacked) {
  Matrix result = matrix_of(layer_of(stacked, 0));
  result.layers = to_int("layers", stacked.size(0));
  result.stride = stacked.stride(0);
  return result;
}

Tensor tensor_of(const Matrix& matrix, const Tensor& like) {
  const int64_t sizes[] = {matrix.rows, matrix.cols};
  const int64_t strides[] = {matrix.row_stride, matrix.col_stride};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(matrix.data, 2, sizes, strides, 0, raw_dtype(matrix.dtype),
                                         device_type_of(like), like.get_device_index(), &made));
  return Tensor(made);
}

Matrix repeated(const std::optional<Tensor>& row, int64_t rows) {
  return row ? Matrix{row->data_ptr(), dtype_of(*row), rows, row->size(0), 0, 1} : Matrix{};
}

Tensor gemm_operand(const Tensor& tensor) {
  return is_gemm_operand(matrix_of(tensor)) ? tensor : torch::stable::contiguous(tensor);
}

Tensor batch_operand(const Tensor& stacked, DType dtype) {
  const bool usable =
      dtype_of(stacked) == dtype && is_gemm_operand(matrix_of(layer_of(stacked, 0)));
  return usable ? stacked : dense(stacked, dtype);
}

Tensor dense(const Tensor& tensor, DType dtype) {
  if (tensor.is_contiguous() && raw_dtype(tensor) == raw_dtype(dtype)) return tensor;
  const auto sizes = tensor.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor result = empty_strided(tensor, shape, strides_of(shape), raw_dtype(dtype));
  copy(result, tensor);
  return result;
}

Tensor layer_of(const Tensor& stacked, int64_t layer) {
  const auto sizes = stacked.sizes(), strides = stacked.strides();
  return view_of(stacked, {sizes.begin() + 1, sizes.end()}, {strides.begin() + 1, strides.end()},
                 layer * strides[0]);
}

void check_layers(const char* op, const char* name, size_t layers, const char* other,
                  size_t others) {
  const std::string start = "rasa_ext::" + std::string(op) + ": ";
  if (layers == 0 || layers > 65535) {
    throw std::runtime_error(start + name + ": expected 1 to 65535 layers, got " +
                             std::to_string(layers) + ".");
  }
  if (layers != others) {
    throw std::runtime_error(start + other + ": expected as many layers as " + name + " has, " +
                             std::to_string(layers) + ", got " + std::to_string(others) + ".");
  }
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  return empty_strided(like, sizes, strides_of(sizes), raw_dtype(dtype));
}

Tensor empty_bytes(const Tensor& like, size_t bytes) {
  return empty(like, {static_cast<int64_t>((bytes + 3) / 4)}, DType::kFloat32);
}

Tensor empty_mask(const Tensor& like, int64_t bytes) {
  return empty_strided(like, {bytes}, {1}, aoti_torch_dtype_uint8());
}

void fill_zero(Tensor& tensor) { torch::stable::zero_(tensor); }

void fill_rows_of_layers(Tensor& y, const Tensor& rows) {
  const std::vector<int64_t> sizes = {y.size(0), y.size(1), y.size(2)};
  copy(y, view_of(rows, sizes, {rows.stride(0), 0, rows.stride(1)}, 0));
}

void copy(Tensor& y, const Tensor& source) { torch::stable::copy_(y, source); }

}  // namespace rasa_ext
