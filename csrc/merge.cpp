// dW = Bt Ap of all layers of a group, alone or added to their weights, as batched products.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "device.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// Of a stack of matrices: the first one, and the distance between neighbours.
struct Stack {
  Tensor tensor;
  Matrix first() const { return matrix_of(layer_of(tensor, 0)); }
  int64_t stride() const { return tensor.stride(0); }
};

Stack stack_of(const Tensor& stacked, DType dtype) {
  const bool usable =
      dtype_of(stacked) == dtype && is_gemm_operand(matrix_of(layer_of(stacked, 0)));
  return {usable ? stacked : dense(stacked, dtype)};
}

void check_stacks(const Checks& checks, const Tensor& Ap, const Tensor& Bt) {
  checks.shape("Ap", Ap, {-1, -1, -1});
  checks.like("Bt", Bt, {Ap.size(0), -1, Ap.size(1)});
}

// C_i = alpha * Bt_i Ap_i + beta * C_i for `count` layers from `begin` on.
void multiply_layers(const Device& device, const Stack& Bt, const Stack& Ap, const Tensor& C,
                     int64_t begin, int count, double alpha, double beta) {
  Matrix a = Bt.first(), b = Ap.first();
  a.data = static_cast<char*>(a.data) + begin * Bt.stride() * size_of(a.dtype);
  b.data = static_cast<char*>(b.data) + begin * Ap.stride() * size_of(b.dtype);
  GemmCall call = multiply_strided(a, b, matrix_of(layer_of(C, 0)), beta, count, Bt.stride(),
                                   Ap.stride(), C.stride(0));
  call.alpha = alpha;
  call.allow_tf32 = false;  // what is merged is kept: its precision is not a matter of speed
  gemm_strided(device.blas(), call);
}

// Whether the weights can be added to where they lie: of the dtype of the sums, all lying alike.
bool can_add_in_place(const std::vector<Tensor>& weights, DType wide) {
  const Matrix first = matrix_of(weights[0]);
  return first.dtype == wide && is_gemm_operand(first) &&
         std::all_of(weights.begin(), weights.end(), [&](const Tensor& weight) {
           return weight.stride(0) == first.row_stride && weight.stride(1) == first.col_stride;
         });
}

void add_in_place(const Device& device, const std::vector<Tensor>& weights, const Stack& Bt,
                  const Stack& Ap, double sign) {
  const int64_t count = static_cast<int64_t>(weights.size());
  // Three arrays of pointers, one after the other.
  std::vector<void*> table(3 * weights.size());
  for (int64_t i = 0; i < count; ++i) {
    table[i] = layer_of(Bt.tensor, i).data_ptr();
    table[count + i] = layer_of(Ap.tensor, i).data_ptr();
    table[2 * count + i] = weights[i].data_ptr();
  }
  const Tensor uploaded = device.upload(weights[0], table.data(), table.size() * sizeof(void*));
  void** pointers = static_cast<void**>(uploaded.data_ptr());
  Matrix a = Bt.first(), b = Ap.first(), c = matrix_of(weights[0]);
  a.data = pointers;
  b.data = pointers + count;
  c.data = pointers + 2 * count;
  GemmCall call = multiply(a, b, c, 1);
  call.batch = static_cast<int>(count);
  call.alpha = sign;
  call.allow_tf32 = false;
  gemm_pointers(device.blas(), call);
}

// How many layers' weights stand beside the model at a time: as many as 256 MiB hold, so that a
// merge needs little memory of its own, and one product still fills the device.
int layers_at_a_time(int64_t layer_bytes, int64_t layers) {
  const int64_t budget = int64_t{256} << 20;
  return static_cast<int>(
      std::clamp<int64_t>(budget / std::max<int64_t>(layer_bytes, 1), 1, layers));
}

}  // namespace

Tensor delta_layers(const Tensor& Ap, const Tensor& Bt) {
  check_stacks(Checks("delta_layers", "Ap", Ap), Ap, Bt);
  const DType dtype = dtype_of(Ap);
  const Device device(Ap);
  const Tensor delta = empty(Ap, {Ap.size(0), Bt.size(1), Ap.size(2)}, accumulation(dtype));
  if (delta.numel() == 0) return delta;
  multiply_layers(device, stack_of(Bt, dtype), stack_of(Ap, dtype), delta, 0,
                  to_int("layers", Ap.size(0)), 1, 0);
  return delta;
}

void merge_layers(const std::vector<Tensor>& weights, const Tensor& Ap, const Tensor& Bt,
                  double sign) {
  const Checks stacks("merge_layers", "Ap", Ap);
  check_stacks(stacks, Ap, Bt);
  check_layers("merge_layers", weights.size(), static_cast<size_t>(Ap.size(0)));
  const Checks checks("merge_layers", "weights[0]", weights[0]);
  for (const Tensor& weight : weights) checks.like("weights", weight, {Bt.size(1), Ap.size(2)});
  checks.device("Ap", Ap);
  if (weights[0].numel() == 0) return;

  const bool any_float64 =
      dtype_of(weights[0]) == DType::kFloat64 || dtype_of(Ap) == DType::kFloat64;
  const DType wide = any_float64 ? DType::kFloat64 : DType::kFloat32;
  const Device device(Ap);
  const Stack up = stack_of(Bt, wide), down = stack_of(Ap, wide);
  if (can_add_in_place(weights, wide)) {
    add_in_place(device, weights, up, down, sign);
    return;
  }
  const int64_t rows = Bt.size(1), cols = Ap.size(2), layers = Ap.size(0);
  const int step = layers_at_a_time(rows * cols * static_cast<int64_t>(size_of(wide)), layers);
  const Tensor sums = empty(Ap, {step, rows, cols}, wide);
  for (int64_t begin = 0; begin < layers; begin += step) {
    const int count = static_cast<int>(std::min<int64_t>(step, layers - begin));
    for (int i = 0; i < count; ++i) {
      Tensor sum = layer_of(sums, i);
      copy(sum, weights[begin + i]);
    }
    multiply_layers(device, up, down, sums, begin, count, sign, 1);
    for (int i = 0; i < count; ++i) {
      Tensor weight = weights[begin + i];
      copy(weight, layer_of(sums, i));
    }
  }
}

}  // namespace rasa_ext
