// Checks, allocation and launches of pack's backward, for one layer and for a group.
#include <stdexcept>
#include <vector>

#include "device.h"
#include "launchers.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// One layer's gradients of Ap and Bt, and what they are multiplied with; every tensor dense.
struct Grads {
  Tensor dAp;  // (Rp, in)
  Tensor dBt;  // (Rp, out): by columns
  Tensor B, d;
  std::optional<Tensor> B_pool;
  int in, out, own, pooled;
};

Grads checked(const char* op, const Tensor& dAp, const Tensor& dBt, const Tensor& B,
              const std::optional<Tensor>& B_pool, const std::optional<Tensor>& d) {
  const Checks checks(op, "B", B);
  const DType param = dtype_of(B), wide = accumulation(param);
  checks.shape("B", B, {-1, -1});
  const int64_t out = B.size(0), own = B.size(1), pooled = B_pool ? B_pool->size(1) : 0;
  if (B_pool) checks.like("B_pool", *B_pool, {out, pooled});
  if (d) checks.like("d", *d, {own + pooled});
  checks.shape("dAp", dAp, {-1, -1});
  checks.device("dAp", dAp);
  checks.shape("dBt", dBt, {out, dAp.size(0)});
  checks.device("dBt", dBt);
  if (dAp.size(0) < own + pooled) {
    checks.refuse("dAp", "at least " + std::to_string(own + pooled) + " rows, as there are ranks",
                  std::to_string(dAp.size(0)));
  }
  Grads grads{dense(dAp, wide),
              dense(transposed(dBt), wide),
              dense(B, param),
              d ? dense(*d, param) : ones(B, own + pooled, param),
              {},
              to_int("in_features", dAp.size(1)),
              to_int("out_features", out),
              to_int("rank", own),
              to_int("pooled rank", pooled)};
  if (B_pool) grads.B_pool = dense(*B_pool, param);
  return grads;
}

PackBackwardLayer entry(const Grads& grads, void* dA, void* dB, void* dd) {
  return {grads.dAp.data_ptr(),
          grads.dBt.data_ptr(),
          grads.B.data_ptr(),
          grads.B_pool ? grads.B_pool->data_ptr() : nullptr,
          grads.d.data_ptr(),
          dA,
          dB,
          dd,
          grads.in,
          grads.out,
          grads.own,
          grads.pooled};
}

Tensor workspace_for(const Grads& grads, int layers, DType param) {
  return empty_bytes(grads.d,
                     pack_backward_workspace(layers, grads.out, grads.own, grads.pooled, param));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_backward(
    const Tensor& dAp, const Tensor& dBt, const Tensor& B, const std::optional<Tensor>& B_pool,
    const std::optional<Tensor>& d) {
  const DType param = dtype_of(B);
  const Device device(B);
  const Grads grads = checked("pack_backward", dAp, dBt, B, B_pool, d);
  const Tensor dA = empty(B, {grads.own, grads.in}, param);
  const Tensor dA_pool = empty(B, {grads.pooled, grads.in}, param);
  const Tensor dB = empty(B, {grads.out, grads.own}, param);
  const Tensor dB_pool = empty_by_columns(B, grads.out, grads.pooled, param);
  const Tensor dd = empty(B, {grads.own + grads.pooled}, param);
  const Tensor workspace = workspace_for(grads, 1, param);
  launch_pack_backward(entry(grads, dA.data_ptr(), dB.data_ptr(), dd.data_ptr()),
                       {dA_pool.data_ptr(), dB_pool.data_ptr()}, workspace.data_ptr(), param,
                       device.stream());
  device.check_launch("pack_backward");
  return {dA, dA_pool, dB, dB_pool, d ? dd : nothing(B, param)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_layers_backward(
    const Tensor& dAp, const Tensor& dBt, const std::vector<Tensor>& B,
    const std::optional<Tensor>& B_pool, const std::vector<Tensor>& d) {
  const size_t layers = B.size();
  check_layers("pack_layers_backward", layers, d.size());
  const Checks checks("pack_layers_backward", "d[0]", d[0]);
  checks.shape("dAp", dAp, {static_cast<int64_t>(layers), -1, -1});
  checks.shape("dBt", dBt, {static_cast<int64_t>(layers), -1, -1});
  const DType param = dtype_of(d[0]);
  const Device device(d[0]);
  std::vector<Grads> grads;
  for (size_t i = 0; i < layers; ++i) {
    checks.like("B[i]", B[i], {B[0].size(0), B[0].size(1)});
    checks.like("d[i]", d[i], {d[0].size(0)});
    grads.push_back(
        checked("pack_layers_backward", layer_of(dAp, i), layer_of(dBt, i), B[i], B_pool, d[i]));
  }
  const Grads& first = grads[0];
  const int64_t count = static_cast<int64_t>(layers);
  const Tensor dA = empty(d[0], {count, first.own, first.in}, param);
  const Tensor dA_pool = empty(d[0], {first.pooled, first.in}, param);
  const Tensor dB = empty(d[0], {count, first.out, first.own}, param);
  const Tensor dB_pool = empty_by_columns(d[0], first.out, first.pooled, param);
  const Tensor dd = empty(d[0], {count, first.own + first.pooled}, param);
  std::vector<PackBackwardLayer> table;
  for (size_t i = 0; i < layers; ++i) {
    table.push_back(entry(grads[i], layer_of(dA, i).data_ptr(), layer_of(dB, i).data_ptr(),
                          layer_of(dd, i).data_ptr()));
  }
  const Tensor uploaded =
      device.upload(d[0], table.data(), table.size() * sizeof(PackBackwardLayer));
  const Tensor workspace = workspace_for(first, static_cast<int>(layers), param);
  launch_pack_layers_backward(table.data(),
                              static_cast<const PackBackwardLayer*>(uploaded.data_ptr()),
                              static_cast<int>(layers), {dA_pool.data_ptr(), dB_pool.data_ptr()},
                              workspace.data_ptr(), param, device.stream());
  device.check_launch("pack_layers_backward");
  return {dA, dA_pool, dB, dB_pool, dd};
}

}  // namespace rasa_ext
