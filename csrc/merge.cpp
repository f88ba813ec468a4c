// dW = Bp^T Ap of all layers of a group, returned or added to the weights. Products run in batches.
// Weights that have the dtype of the sums are added to in place instead, one product each.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "device.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

void check_stacks(const Checks& checks, const Tensor& Ap, const Tensor& Bp) {
  checks.shape("Ap", Ap, {-1, -1, -1});
  checks.like("Bp", Bp, {Ap.size(0), Ap.size(1), -1});
}

// Merged weights are permanent, so precision matters more than speed.
GemmCall exact(GemmCall call) {
  call.allow_tf32 = false;
  return call;
}

// Returns how many layers' sums are in memory at a time: as many as fit in 256 MiB, so that a merge
// needs little memory and one product still fills the device.
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
  const GemmCall call = multiply(layers_of(up).t(), layers_of(down), layers_of(delta), false);
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
  const Matrix ups = layers_of(up).t(), downs = layers_of(down);
  const bool in_place = dtype_of(weights[0]) == wide &&
                        std::all_of(weights.begin(), weights.end(), [](const Tensor& weight) {
                          return is_gemm_operand(matrix_of(weight));
                        });
  if (in_place) {
    for (size_t i = 0; i < weights.size(); ++i) {
      gemm(device.blas(), exact(multiply(ups.from(i), downs.from(i), matrix_of(weights[i]), true)));
    }
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
    gemm_strided(device.blas(), exact(multiply(ups.from(begin, count), downs.from(begin, count),
                                               layers_of(sums).from(0, count), true)));
    for (int i = 0; i < count; ++i) {
      Tensor weight = weights[begin + i];
      copy(weight, layer_of(sums, i));
    }
  }
}

}  // namespace rasa_ext
