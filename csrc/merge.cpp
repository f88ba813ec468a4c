// dW = Bp^T Ap of all layers of a group, alone or added to their weights, as batched products.
#include <algorithm>
#include <vector>

#include "batch.h"
#include "blas.h"
#include "device.h"
#include "heuristics.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

void check_stacks(const Checks& checks, const Tensor& Ap, const Tensor& Bp) {
  checks.shape("Ap", Ap, {-1, -1, -1});
  checks.like("Bp", Bp, {Ap.size(0), Ap.size(1), -1});
}

// What is merged is kept: its precision is not a matter of speed.
GemmCall exact(GemmCall call) {
  call.allow_tf32 = false;
  return call;
}

// Whether the weights can be added to where they lie: of the dtype of the sums, all lying alike.
bool can_add_in_place(const std::vector<Tensor>& weights, DType wide) {
  return dtype_of(weights[0]) == wide && lie_alike(weights);
}

void add_in_place(const Device& device, const std::vector<Tensor>& weights, const Tensor& Bp,
                  const Tensor& Ap) {
  const int layers = static_cast<int>(weights.size());
  if (fills_device(weights[0].size(0), weights[0].size(1))) {
    for (int i = 0; i < layers; ++i) {
      const Matrix up = matrix_of(layer_of(Bp, i)), down = matrix_of(layer_of(Ap, i));
      gemm(device.blas(), exact(multiply(up.t(), down, matrix_of(weights[i]), 1)));
    }
    return;
  }
  std::optional<Tensor> table;
  const GemmCall call = multiply(device, weights[0], scattered(layers_of(Bp).t(), layers),
                                 scattered(layers_of(Ap), layers), scattered(weights), 1, table);
  gemm_pointers(device.blas(), exact(call));
}

// How many layers' weights stand beside the model at a time: as many as 256 MiB hold, so that a
// merge needs little memory of its own, and one product still fills the device.
int layers_at_a_time(int64_t layer_bytes, int64_t layers) {
  const int64_t budget = int64_t{256} << 20;
  return static_cast<int>(
      std::clamp<int64_t>(budget / std::max<int64_t>(layer_bytes, 1), 1, layers));
}

}  // namespace

Tensor delta_group(const Tensor& Ap, const Tensor& Bp) {
  check_stacks(Checks("delta_group", "Ap", Ap), Ap, Bp);
  const DType dtype = dtype_of(Ap);
  const Device device(Ap);
  const Tensor delta = empty(Ap, {Ap.size(0), Bp.size(2), Ap.size(2)}, accumulation(dtype));
  if (delta.numel() == 0) return delta;
  const Tensor up = batch_operand(Bp, dtype), down = batch_operand(Ap, dtype);
  const GemmCall call = multiply(layers_of(up).t(), layers_of(down), layers_of(delta), 0,
                                 to_int("layers", Ap.size(0)));
  gemm_strided(device.blas(), exact(call));
  return delta;
}

void merge_group(const std::vector<Tensor>& weights, const Tensor& Ap, const Tensor& Bp) {
  const Checks stacks("merge_group", "Ap", Ap);
  check_stacks(stacks, Ap, Bp);
  check_layers("merge_group", "weights", weights.size(), "Ap", static_cast<size_t>(Ap.size(0)));
  const Checks checks("merge_group", "weights[0]", weights[0]);
  for (const Tensor& weight : weights) checks.like("weights", weight, {Bp.size(2), Ap.size(2)});
  checks.device("Ap", Ap);
  if (weights[0].numel() == 0) return;

  const bool any_float64 =
      dtype_of(weights[0]) == DType::kFloat64 || dtype_of(Ap) == DType::kFloat64;
  const DType wide = any_float64 ? DType::kFloat64 : DType::kFloat32;
  const Device device(Ap);
  const Tensor up = batch_operand(Bp, wide), down = batch_operand(Ap, wide);
  if (can_add_in_place(weights, wide)) {
    add_in_place(device, weights, up, down);
    return;
  }
  const int64_t rows = Bp.size(2), cols = Ap.size(2), layers = Ap.size(0);
  const int step = layers_at_a_time(rows * cols * static_cast<int64_t>(size_of(wide)), layers);
  const Tensor sums = empty(Ap, {step, rows, cols}, wide);
  for (int64_t begin = 0; begin < layers; begin += step) {
    const int count = static_cast<int>(std::min<int64_t>(step, layers - begin));
    for (int i = 0; i < count; ++i) {
      Tensor sum = layer_of(sums, i);
      copy(sum, weights[begin + i]);
    }
    const GemmCall call = multiply(layers_of(up).from(begin).t(), layers_of(down).from(begin),
                                   layers_of(sums), 1, count);
    gemm_strided(device.blas(), exact(call));
    for (int i = 0; i < count; ++i) {
      Tensor weight = weights[begin + i];
      copy(weight, layer_of(sums, i));
    }
  }
}

}  // namespace rasa_ext
