#include <cmath>
#include <memory>
#include <utility>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

using rasa_ext::PackBackwardGroup;
using rasa_ext::PackBackwardLayer;

struct Shape {
  int in, out, own, pooled, Rp;
};

struct Layer {
  Shape shape;
  Array dAp, dBp, B, d, dA, dB, dd;

  Layer(const Shape& s, DType param, int offset)
      : shape(s),
        dAp(accumulation(param), int64_t{s.Rp} * s.in, offset),
        dBp(accumulation(param), int64_t{s.Rp} * s.out, offset),
        B(param, int64_t{s.own} * s.out, offset),
        d(param, s.own + s.pooled, offset),
        dA(param, int64_t{s.own} * s.in, offset),
        dB(param, int64_t{s.own} * s.out, offset),
        dd(param, s.own + s.pooled, offset) {
    for (Array* input : {&dAp, &dBp, &B, &d}) input->randomize();
  }

  PackBackwardLayer pointers() const {
    return {dAp.data(), dBp.data(), B.data(), d.data(), dA.data(), dB.data(), dd.data()};
  }

  void expect_own(const Array& B_pool) const {
    const int own = shape.own, R = own + shape.pooled, out = shape.out;
    expect_rounded("dA", dA, [&](int64_t i) { return dAp[i]; });
    expect_rounded("dB", dB, [&](int64_t i) { return dBp[i] * d[i / out]; });
    std::vector<double> sum(R), terms(R);
    for (int64_t i = 0; i < int64_t{R} * out; ++i) {
      const int64_t pooled = i - int64_t{own} * out;
      const double term = (pooled < 0 ? B[i] : B_pool[pooled]) * dBp[i];
      sum[i / out] += term;
      terms[i / out] += std::abs(term);
    }
    expect(
        "dd", dd, [&](int64_t j) { return sum[j]; },
        [&](int64_t j) {
          // A thread's share of the row, the lanes, the warps.
          const double steps = 32 + out / 256.0;
          return terms[j] * steps * rounding(accumulation(dd.dtype())) +
                 std::abs(sum[j]) * rounding(dd.dtype()) + 0x1p-24;
        });
  }
};

// The pool's gradients, summed over layers.
void expect_pool(const std::vector<std::unique_ptr<Layer>>& layers, const Array& dA_pool,
                 const Array& dB_pool) {
  if (layers.empty()) return;
  const Shape& shape = layers[0]->shape;
  const auto slack = [&](const Array& array, double all, double absolute) {
    const double sums = layers.size() * rounding(accumulation(array.dtype())) * absolute;
    return sums + std::abs(all) * rounding(array.dtype()) * 1.001 + 0x1p-24;
  };
  const auto down = [&](int64_t i, bool absolute) {
    double all = 0;
    for (const auto& layer : layers) {
      const double value = layer->dAp[int64_t{shape.own} * shape.in + i];
      all += absolute ? std::abs(value) : value;
    }
    return all;
  };
  const auto up = [&](int64_t i, bool absolute) {
    double all = 0;
    for (const auto& layer : layers) {
      const int64_t j = shape.own + i / shape.out;
      const double value = layer->dBp[j * shape.out + i % shape.out] * layer->d[j];
      all += absolute ? std::abs(value) : value;
    }
    return all;
  };
  expect(
      "dA_pool", dA_pool, [&](int64_t i) { return down(i, false); },
      [&](int64_t i) { return slack(dA_pool, down(i, false), down(i, true)); });
  expect(
      "dB_pool", dB_pool, [&](int64_t i) { return up(i, false); },
      [&](int64_t i) { return slack(dB_pool, up(i, false), up(i, true)); });
}

std::string text_of(const Shape& shape) {
  return "in " + std::to_string(shape.in) + " out " + std::to_string(shape.out) + " own " +
         std::to_string(shape.own) + " pooled " + std::to_string(shape.pooled) + " Rp " +
         std::to_string(shape.Rp);
}

// Layers of one shape with one pool.
struct Group {
  std::vector<std::unique_ptr<Layer>> layers;
  Array B_pool, dA_pool, dB_pool;
  Shape shape;

  Group(const Shape& s, int count, DType param, int offset)
      : B_pool(param, int64_t{s.pooled} * s.out, offset),
        dA_pool(param, int64_t{s.pooled} * s.in, offset),
        dB_pool(param, int64_t{s.pooled} * s.out, offset),
        shape(s) {
    B_pool.randomize();
    for (int i = 0; i < count; ++i) layers.push_back(std::make_unique<Layer>(s, param, offset));
  }

  PackBackwardGroup pointers() const {
    return {B_pool.data(), dA_pool.data(), dB_pool.data(), static_cast<int>(layers.size()),
            shape.in,      shape.out,      shape.own,      shape.pooled};
  }
};

void check_groups(const std::vector<std::pair<Shape, int>>& shapes, DType param, int offset) {
  std::string name = "offset " + std::to_string(offset) + " " + name_of(param);
  std::vector<std::unique_ptr<Group>> groups;
  std::vector<PackBackwardGroup> several;
  std::vector<PackBackwardLayer> host;
  std::vector<Array*> outputs;
  for (const auto& [shape, count] : shapes) {
    name = std::to_string(count) + " layers " + text_of(shape) + ", " + name;
    groups.push_back(std::make_unique<Group>(shape, count, param, offset));
    Group& group = *groups.back();
    several.push_back(group.pointers());
    outputs.insert(outputs.end(), {&group.dA_pool, &group.dB_pool});
    for (const auto& layer : group.layers) {
      host.push_back(layer->pointers());
      outputs.insert(outputs.end(), {&layer->dA, &layer->dB, &layer->dd});
    }
  }
  begin_case(name);
  const size_t bytes = host.size() * sizeof(PackBackwardLayer);
  auto* table = host.size() > rasa_ext::kLayersByValue
                    ? static_cast<PackBackwardLayer*>(allocate(bytes))
                    : nullptr;
  if (table != nullptr) std::copy(host.begin(), host.end(), table);
  run_repeatedly("pack_backward", outputs, [&] {
    rasa_ext::launch_pack_backward(several.data(), static_cast<int>(several.size()), host.data(),
                                   table, param, nullptr);
  });
  release(table);
  for (const auto& group : groups) {
    for (const auto& layer : group->layers) layer->expect_own(group->B_pool);
    expect_pool(group->layers, group->dA_pool, group->dB_pool);
  }
}

void check_layers(const Shape& shape, int count, DType param, int offset) {
  check_groups({{shape, count}}, param, offset);
}

// What is not given, or not wanted, is left alone; the rest is as ever. No d stands for ones.
void check_parts(const Shape& shape, bool down, bool up, bool scaled) {
  begin_case(std::string(down ? "dAp " : "") + (up ? "dBp " : "") + (scaled ? "d" : ""));
  const DType param = DType::kFloat32;
  Layer layer(shape, param, 0);
  Array B_pool(param, int64_t{shape.pooled} * shape.out);
  Array dA_pool(param, int64_t{shape.pooled} * shape.in);
  Array dB_pool(param, int64_t{shape.pooled} * shape.out);
  B_pool.randomize();
  PackBackwardLayer pointers = layer.pointers();
  PackBackwardGroup group{B_pool.data(), dA_pool.data(), dB_pool.data(), 1,
                          shape.in,      shape.out,      shape.own,      shape.pooled};
  if (!down) pointers.dAp = pointers.dA = group.dA_pool = nullptr, group.in = 0;
  if (!up) pointers.dBp = pointers.dB = group.dB_pool = nullptr, group.out = 0;
  if (!scaled) pointers.d = nullptr;
  if (!up || !scaled) pointers.dd = nullptr;
  run_repeatedly("pack_backward", {&layer.dA, &dA_pool, &layer.dB, &dB_pool, &layer.dd}, [&] {
    rasa_ext::launch_pack_backward(&group, 1, &pointers, nullptr, param, nullptr);
  });
  const auto expect_part = [](const char* name, const Array& array, bool given,
                              const std::function<double(int64_t)>& expected) {
    for (int64_t i = 0; !given && i < array.size(); ++i) {
      if (array[i] == array[i]) fail(std::string(name) + ": written");
    }
    if (given) expect_rounded(name, array, expected);
  };
  const int64_t own_in = int64_t{shape.own} * shape.in, own_out = int64_t{shape.own} * shape.out;
  const auto dB_of = [&](int64_t i) {
    return layer.dBp[i] * (scaled ? layer.d[i / shape.out] : 1.0);
  };
  expect_part("dA", layer.dA, down, [&](int64_t i) { return layer.dAp[i]; });
  expect_part("dA_pool", dA_pool, down, [&](int64_t i) { return layer.dAp[own_in + i]; });
  expect_part("dB", layer.dB, up, dB_of);
  expect_part("dB_pool", dB_pool, up, [&](int64_t i) { return dB_of(own_out + i); });
  if (!up || !scaled) expect_part("dd", layer.dd, false, {});
}

}  // namespace

void check_pack_backward() {
  const std::vector<Shape> shapes{{40, 24, 7, 32, 48},
                                  {33, 300, 7, 32, 39},
                                  {5, 257, 3, 4, 16},
                                  {64, 131, 0, 8, 16},
                                  {9, 5, 1, 0, 1},
                                  {24, 140, 8, 0, 16},
                                  {16, 40, 28, 128, 160},
                                  // Rows of a piece, of one and a bit, and of several.
                                  {256, 264, 2, 1, 4},
                                  {257, 255, 2, 2, 4},
                                  {520, 8, 1, 2, 3},
                                  {8, 520, 1, 2, 3},
                                  {0, 6, 3, 2, 16},
                                  {6, 0, 3, 2, 16},
                                  {4, 4, 0, 0, 0},
                                  // A row of what a block takes at a time, and a bit.
                                  {4, 4104, 1, 1, 2},
                                  {4, 4097, 1, 1, 2}};
  if (is_small()) {
    check_layers(shapes[2], 1, DType::kFloat32, 1);
    check_layers({33, 300, 3, 4, 16}, 2, DType::kBFloat16, 0);
    return;
  }
  std::vector<DType> params = dtypes();
  params.push_back(DType::kFloat64);
  for (const Shape& shape : shapes) {
    for (const DType param : params) {
      for (const int offset : {0, 1}) {
        for (const int count : {1, 2}) check_layers(shape, count, param, offset);
      }
    }
  }
  for (const int count : {0, rasa_ext::kLayersByValue, rasa_ext::kLayersByValue + 1}) {
    check_layers({9, 8, 2, 1, 4}, count, DType::kFloat32, 0);
  }
  // Projections: a layer each, of shapes that want few blocks or many; and groups of several.
  for (const DType param : params) {
    for (const int offset : {0, 1}) {
      check_groups({{{40, 4104, 7, 32, 39}, 1}, {{40, 24, 7, 1, 8}, 1}, {{40, 9, 0, 3, 3}, 1}},
                   param, offset);
      check_groups({{{9, 8, 2, 1, 4}, 2}, {{520, 264, 1, 2, 3}, 3}}, param, offset);
    }
  }
  check_groups(std::vector<std::pair<Shape, int>>(rasa_ext::kGroupsByValue, {{9, 8, 2, 1, 4}, 1}),
               DType::kFloat32, 0);
  check_groups({{{9, 8, 2, 1, 4}, 20}, {{9, 6, 3, 2, 5}, rasa_ext::kLayersByValue}},
               DType::kFloat32, 0);
  check_parts({40, 24, 3, 4, 16}, true, false, true);
  check_parts({40, 24, 3, 4, 16}, false, true, true);
  check_parts({40, 24, 3, 4, 16}, true, true, false);
  check_parts({40, 1, 3, 4, 16}, true, true, false);
}

}  // namespace check
