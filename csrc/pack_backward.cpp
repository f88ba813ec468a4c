// Checks, allocation and launch of pack's backward, for one layer and for a group.
#include <stdexcept>
#include <vector>

#include "device.h"
#include "launchers.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// One layer's gradients of Ap and Bp, and what they are multiplied with; every tensor dense, B by
// ranks.
struct Grads {
  std::optional<Tensor> dAp, dBp;  // (Rp, in), (Rp, out)
  Tensor B;                        // (own, out)
  std::optional<Tensor> d;
};

Grads checked(const char* op, const std::optional<Tensor>& dAp, const std::optional<Tensor>& dBp,
              const Tensor& B, const std::optional<Tensor>& B_pool,
              const std::optional<Tensor>& d) {
  const Checks checks(op, "B", B);
  const DType param = dtype_of(B), wide = accumulation(param);
  checks.shape("B", B, {-1, -1});
  const int64_t out = B.size(0), R = B.size(1) + (B_pool ? B_pool->size(1) : 0);
  if (B_pool) checks.like("B_pool", *B_pool, {out, -1});
  if (d) checks.like("d", *d, {R});
  const auto rows_of = [&](const char* name, const std::optional<Tensor>& grad, int64_t width) {
    if (!grad) return std::optional<Tensor>();
    checks.shape(name, *grad, {-1, width});
    checks.device(name, *grad);
    if (grad->size(0) < R) {
      checks.refuse(name, "at least " + std::to_string(R) + " rows, as there are ranks",
                    std::to_string(grad->size(0)));
    }
    return std::optional<Tensor>(dense(*grad, wide));
  };
  Grads grads{rows_of("dAp", dAp, -1), rows_of("dBp", dBp, out), dense(transposed(B), param), {}};
  if (d) grads.d = dense(*d, param);
  return grads;
}

// Stacks of `count` layers, dB and dB_pool by ranks; of what is not given they have no elements.
struct Results {
  Tensor dA, dA_pool, dB, dB_pool, dd;
};

void launch(const char* op, const Device& device, const std::vector<Grads>& grads,
            const std::optional<Tensor>& B_pool, const Results& results) {
  const Grads& first = grads[0];
  const DType param = dtype_of(first.B);
  std::optional<Tensor> pool;
  if (B_pool) pool = dense(transposed(*B_pool), param);
  const int own = to_int("rank", first.B.size(0));
  const int pooled = pool ? to_int("pooled rank", pool->size(0)) : 0;
  const int in = first.dAp ? to_int("in_features", first.dAp->size(1)) : 0;
  const int out = first.dBp ? to_int("out_features", first.dBp->size(1)) : 0;
  const PackBackwardGroup group{data_of(pool),
                                results.dA_pool.data_ptr(),
                                results.dB_pool.data_ptr(),
                                to_int("layers", static_cast<int64_t>(grads.size())),
                                in,
                                out,
                                own,
                                pooled};
  const auto layer = [&](const Tensor& stack, size_t i, int64_t elements) {
    return static_cast<char*>(stack.data_ptr()) + i * elements * size_of(param);
  };
  std::vector<PackBackwardLayer> layers;
  for (size_t i = 0; i < grads.size(); ++i) {
    layers.push_back({data_of(grads[i].dAp), data_of(grads[i].dBp), grads[i].B.data_ptr(),
                      data_of(grads[i].d), layer(results.dA, i, int64_t{own} * in),
                      layer(results.dB, i, int64_t{own} * out),
                      first.d && first.dBp ? layer(results.dd, i, own + pooled) : nullptr});
  }
  std::optional<Tensor> table;
  if (layers.size() > kLayersByValue) {
    table = device.upload(first.B, layers.data(), layers.size() * sizeof(PackBackwardLayer));
  }
  launch_pack_backward(group, layers.data(), static_cast<const PackBackwardLayer*>(data_of(table)),
                       param, device.stream());
  device.check_launch(op);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_backward(
    const std::optional<Tensor>& dAp, const std::optional<Tensor>& dBp, const Tensor& B,
    const std::optional<Tensor>& B_pool, const std::optional<Tensor>& d) {
  const DType param = dtype_of(B);
  const Device device(B);
  const Grads grads = checked("pack_backward", dAp, dBp, B, B_pool, d);
  const int64_t own = B.size(1), pooled = B_pool ? B_pool->size(1) : 0;
  const auto rows = [&](const std::optional<Tensor>& grad, int64_t ranks) {
    return grad ? empty(B, {ranks, grad->size(1)}, param) : nothing(B, param);
  };
  const Results results{rows(dAp, own), rows(dAp, pooled), rows(dBp, own), rows(dBp, pooled),
                        d && dBp ? empty(B, {own + pooled}, param) : nothing(B, param)};
  launch("pack_backward", device, {grads}, B_pool, results);
  if (!dBp) return {results.dA, results.dA_pool, results.dB, results.dB_pool, results.dd};
  return {results.dA, results.dA_pool, transposed(results.dB), transposed(results.dB_pool),
          results.dd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_group_backward(
    const Tensor& dAp, const Tensor& dBp, const std::vector<Tensor>& B,
    const std::optional<Tensor>& B_pool, const std::vector<Tensor>& d) {
  const char* op = "pack_group_backward";
  check_layers(op, B.size(), d.size());
  const int64_t layers = static_cast<int64_t>(B.size());
  const Checks checks(op, "B[0]", B[0]);
  checks.shape("B[0]", B[0], {-1, -1});
  checks.shape("dAp", dAp, {layers, -1, -1});
  checks.shape("dBp", dBp, {layers, -1, -1});
  const DType param = dtype_of(B[0]);
  const Device device(B[0]);
  std::vector<Grads> grads;
  for (int64_t i = 0; i < layers; ++i) {
    checks.like("B[i]", B[i], {B[0].size(0), B[0].size(1)});
    grads.push_back(checked(op, layer_of(dAp, i), layer_of(dBp, i), B[i], B_pool, d[i]));
  }
  const int64_t own = B[0].size(1), pooled = B_pool ? B_pool->size(1) : 0;
  const int64_t in = dAp.size(2), out = dBp.size(2);
  const Results results{empty(B[0], {layers, own, in}, param), empty(B[0], {pooled, in}, param),
                        empty(B[0], {layers, own, out}, param), empty(B[0], {pooled, out}, param),
                        empty(B[0], {layers, own + pooled}, param)};
  launch(op, device, grads, B_pool, results);
  return {results.dA, results.dA_pool, transposed_layers(results.dB), transposed(results.dB_pool),
          results.dd};
}

}  // namespace rasa_ext
