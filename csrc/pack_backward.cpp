// Checks, allocation and launch of pack's backward: of one layer, of projections of one x, of a
// group.
#include <algorithm>
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

// Layers of one shape with one pool.
struct Group {
  std::vector<Grads> grads;
  std::optional<Tensor> pool;  // (pooled, out)
  Results results;

  Group(std::vector<Grads> layers, const std::optional<Tensor>& B_pool, Results made)
      : grads(std::move(layers)), results(std::move(made)) {
    if (B_pool) pool = dense(transposed(*B_pool), dtype_of(grads[0].B));
  }

  PackBackwardGroup pointers() const {
    const Grads& first = grads[0];
    return {data_of(pool),
            results.dA_pool.data_ptr(),
            results.dB_pool.data_ptr(),
            to_int("layers", static_cast<int64_t>(grads.size())),
            first.dAp ? to_int("in_features", first.dAp->size(1)) : 0,
            first.dBp ? to_int("out_features", first.dBp->size(1)) : 0,
            to_int("rank", first.B.size(0)),
            pool ? to_int("pooled rank", pool->size(0)) : 0};
  }

  void append_layers(std::vector<PackBackwardLayer>& table) const {
    const auto [B_pool, dA_pool, dB_pool, count, in, out, own, pooled] = pointers();
    const size_t size = size_of(dtype_of(grads[0].B));
    const auto layer = [&](const Tensor& stack, size_t i, int64_t elements) {
      return static_cast<char*>(stack.data_ptr()) + i * elements * size;
    };
    for (size_t i = 0; i < grads.size(); ++i) {
      const Grads& each = grads[i];
      table.push_back({data_of(each.dAp), data_of(each.dBp), each.B.data_ptr(), data_of(each.d),
                       layer(results.dA, i, int64_t{own} * in),
                       layer(results.dB, i, int64_t{own} * out),
                       each.d && each.dBp ? layer(results.dd, i, own + pooled) : nullptr});
    }
  }
};

void launch(const char* op, const Device& device, const std::vector<Group>& groups) {
  const Tensor& like = groups[0].grads[0].B;
  for (size_t begin = 0; begin < groups.size(); begin += kGroupsByValue) {
    const size_t end = std::min<size_t>(begin + kGroupsByValue, groups.size());
    std::vector<PackBackwardGroup> several;
    std::vector<PackBackwardLayer> layers;
    for (size_t i = begin; i < end; ++i) {
      several.push_back(groups[i].pointers());
      groups[i].append_layers(layers);
    }
    std::optional<Tensor> table;
    if (layers.size() > kLayersByValue) {
      table = device.upload(like, layers.data(), layers.size() * sizeof(PackBackwardLayer));
    }
    launch_pack_backward(several.data(), static_cast<int>(several.size()), layers.data(),
                         static_cast<const PackBackwardLayer*>(data_of(table)), dtype_of(like),
                         device.stream());
    device.check_launch(op);
  }
}

// A layer of its own.
Group lone(const char* op, const std::optional<Tensor>& dAp, const std::optional<Tensor>& dBp,
           const Tensor& B, const std::optional<Tensor>& B_pool, const std::optional<Tensor>& d) {
  const DType param = dtype_of(B);
  Grads grads = checked(op, dAp, dBp, B, B_pool, d);
  const int64_t own = B.size(1), pooled = B_pool ? B_pool->size(1) : 0;
  const auto rows = [&](const std::optional<Tensor>& grad, int64_t ranks) {
    return grad ? empty(B, {ranks, grad->size(1)}, param) : nothing(B, param);
  };
  Results results{rows(dAp, own), rows(dAp, pooled), rows(dBp, own), rows(dBp, pooled),
                  d && dBp ? empty(B, {own + pooled}, param) : nothing(B, param)};
  return Group({std::move(grads)}, B_pool, std::move(results));
}

// dB and dB_pool as users see them.
Tensor shown(const Tensor& by_ranks) {
  return by_ranks.dim() == 2 ? transposed(by_ranks) : by_ranks;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_backward(
    const std::optional<Tensor>& dAp, const std::optional<Tensor>& dBp, const Tensor& B,
    const std::optional<Tensor>& B_pool, const std::optional<Tensor>& d) {
  const char* op = "pack_backward";
  const Device device(B);
  const Group group = lone(op, dAp, dBp, B, B_pool, d);
  launch(op, device, {group});
  const Results& results = group.results;
  return {results.dA, results.dA_pool, shown(results.dB), shown(results.dB_pool), results.dd};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
           std::vector<Tensor>>
pack_projections_backward(const std::vector<Tensor>& dAp, const std::vector<Tensor>& dBp,
                          const std::vector<Tensor>& B, const std::vector<Tensor>& B_pool,
                          const std::vector<Tensor>& d) {
  const char* op = "pack_projections_backward";
  if (!dAp.empty()) check_layers(op, "B", B.size(), "dAp", dAp.size());
  if (!dBp.empty()) check_layers(op, "B", B.size(), "dBp", dBp.size());
  if (!B_pool.empty()) check_layers(op, "B", B.size(), "B_pool", B_pool.size());
  if (!d.empty()) check_layers(op, "B", B.size(), "d", d.size());
  const Device device(B[0]);
  const Checks checks(op, "B[0]", B[0]);
  const auto at = [](const std::vector<Tensor>& list, size_t i) {
    return list.empty() ? std::nullopt : std::optional<Tensor>(list[i]);
  };
  std::vector<Group> groups;
  for (size_t i = 0; i < B.size(); ++i) {
    checks.like("B[i]", B[i], {-1, -1});
    groups.push_back(lone(op, at(dAp, i), at(dBp, i), B[i], at(B_pool, i), at(d, i)));
  }
  launch(op, device, groups);
  std::vector<Tensor> dA, dA_pool, dB, dB_pool, dd;
  for (const Group& group : groups) {
    const Results& results = group.results;
    dA.push_back(results.dA);
    dA_pool.push_back(results.dA_pool);
    dB.push_back(shown(results.dB));
    dB_pool.push_back(shown(results.dB_pool));
    dd.push_back(results.dd);
  }
  return {dA, dA_pool, dB, dB_pool, dd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_group_backward(
    const Tensor& dAp, const Tensor& dBp, const std::vector<Tensor>& B,
    const std::optional<Tensor>& B_pool, const std::vector<Tensor>& d) {
  const char* op = "pack_group_backward";
  check_layers(op, "B", B.size(), "d", d.size());
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
  launch(op, device, {Group(std::move(grads), B_pool, results)});
  return {results.dA, results.dA_pool, transposed_layers(results.dB), transposed(results.dB_pool),
          results.dd};
}

}  // namespace rasa_ext
