#include <cmath>
#include <memory>

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
  Array dAp, dBp, B, d;

  Layer(const Shape& s, DType param, int offset)
      : dAp(accumulation(param), int64_t{s.Rp} * s.in, offset),
        dBp(accumulation(param), int64_t{s.Rp} * s.out, offset),
        B(param, int64_t{s.out} * s.own, offset),
        d(param, s.own + s.pooled, offset) {
    for (Array* input : {&dAp, &dBp, &B, &d}) input->randomize();
  }

  PackBackwardLayer pointers() const { return {dAp.data(), dBp.data(), B.data(), d.data()}; }
};

// Layers of one shape with a shared pool, and their gradients.
struct Group {
  Shape shape;
  std::vector<std::unique_ptr<Layer>> layers;
  Array B_pool, dA, dA_pool, dB, dB_pool, dd;

  Group(const Shape& s, int count, DType param, int offset, int last_offset)
      : shape(s),
        B_pool(param, int64_t{s.pooled} * s.out, offset),
        dA(param, int64_t{count} * s.own * s.in, offset),
        dA_pool(param, int64_t{s.pooled} * s.in, offset),
        dB(param, int64_t{count} * s.own * s.out, offset),
        dB_pool(param, int64_t{s.pooled} * s.out, offset),
        dd(param, int64_t{count} * (s.own + s.pooled), offset) {
    B_pool.randomize();
    for (int i = 1; i <= count; ++i) {
      layers.push_back(std::make_unique<Layer>(s, param, i < count ? offset : last_offset));
    }
  }

  PackBackwardGroup pointers() const {
    return {B_pool.data(),
            dA.data(),
            dA_pool.data(),
            dB.data(),
            dB_pool.data(),
            dd.data(),
            static_cast<int>(layers.size()),
            shape.in,
            shape.out,
            shape.own,
            shape.pooled};
  }

  void expect_down() const {
    const int64_t own = int64_t{shape.own} * shape.in;
    expect_rounded("dA", dA, [&](int64_t i) { return layers[i / own]->dAp[i % own]; });
    expect_pool("dA_pool", dA_pool,
                [&](const Layer& layer, int64_t i) { return layer.dAp[own + i]; });
  }

  void expect_up() const {
    const int64_t own = shape.own, layer_size = own * shape.out;
    const auto scaled = [&](const Layer& layer, int64_t o, int64_t j) {
      return layer.dBp[j * shape.out + o] * layer.d[j];
    };
    expect_rounded("dB", dB, [&](int64_t i) {
      return scaled(*layers[i / layer_size], i % layer_size / own, i % own);
    });
    expect_pool("dB_pool", dB_pool, [&](const Layer& layer, int64_t i) {
      return scaled(layer, i / shape.pooled, own + i % shape.pooled);
    });
  }

  void expect_dots() const {
    const int64_t out = shape.out, own = shape.own, rank = own + shape.pooled;
    std::vector<double> sum(dd.size()), terms(dd.size());
    for (int64_t i = 0; i < dd.size() * out; ++i) {
      const Layer& layer = *layers[i / out / rank];
      const int64_t j = i / out % rank, o = i % out;
      const double B = j < own ? layer.B[o * own + j] : B_pool[o * shape.pooled + j - own];
      const double term = B * layer.dBp[j * out + o];
      sum[i / out] += term;
      terms[i / out] += std::abs(term);
    }
    expect(
        "dd", dd, [&](int64_t j) { return sum[j]; },
        [&](int64_t j) {
          // Roundings in a thread's share of the row, over lanes, and over warps.
          const double steps = 32 + out / 256.0;
          return terms[j] * steps * rounding(accumulation(dd.dtype())) +
                 std::abs(sum[j]) * rounding(dd.dtype()) + 0x1p-24;
        });
  }

  // A pool's gradient, summed over the layers.
  void expect_pool(const char* name, const Array& array,
                   const std::function<double(const Layer&, int64_t)>& of) const {
    if (layers.empty()) return;
    const auto sum = [&](int64_t i, bool absolute) {
      double all = 0;
      for (const auto& layer : layers) {
        all += absolute ? std::abs(of(*layer, i)) : of(*layer, i);
      }
      return all;
    };
    const double step = layers.size() * rounding(accumulation(array.dtype()));
    expect(
        name, array, [&](int64_t i) { return sum(i, false); },
        [&](int64_t i) {
          const double cast = std::abs(sum(i, false)) * rounding(array.dtype()) * 1.001;
          return step * sum(i, true) + cast + 0x1p-24;
        });
  }
};

std::string text_of(const Shape& shape) {
  return "in " + std::to_string(shape.in) + " out " + std::to_string(shape.out) + " own " +
         std::to_string(shape.own) + " pooled " + std::to_string(shape.pooled) + " Rp " +
         std::to_string(shape.Rp);
}

// Arrays that are not given or not wanted must not be written. A missing d means ones.
// `crooked`: only the last layer's arrays are not aligned to 16 bytes.
struct Given {
  bool down = true, up = true, scaled = true, crooked = false;
};

void check_group(const Shape& shape, int count, DType param, int offset, Given given = {}) {
  begin_case(std::to_string(count) + " layers " + text_of(shape) + " offset " +
             std::to_string(offset) + " " + name_of(param) + (given.down ? " dAp" : "") +
             (given.up ? " dBp" : "") + (given.scaled ? " d" : ""));
  Group group(shape, count, param, offset, given.crooked ? 1 : offset);
  PackBackwardGroup pointers = group.pointers();
  std::vector<PackBackwardLayer> host;
  for (const auto& layer : group.layers) {
    host.push_back(layer->pointers());
    if (!given.down) host.back().dAp = nullptr;
    if (!given.up) host.back().dBp = nullptr;
    if (given.scaled) continue;
    host.back().d = nullptr;
    for (int64_t j = 0; j < layer->d.size(); ++j) layer->d.set(j, 1);
  }
  const bool dots = given.up && given.scaled;
  if (!given.down) pointers.dA = pointers.dA_pool = nullptr, pointers.in = 0;
  if (!given.up) pointers.dB = pointers.dB_pool = nullptr, pointers.out = 0;
  if (!dots) pointers.dd = nullptr;
  const size_t bytes = host.size() * sizeof(PackBackwardLayer);
  auto* table =
      count > rasa_ext::kLayersByValue ? static_cast<PackBackwardLayer*>(allocate(bytes)) : nullptr;
  if (table != nullptr) std::copy(host.begin(), host.end(), table);
  run_repeatedly(
      "pack_backward", {&group.dA, &group.dA_pool, &group.dB, &group.dB_pool, &group.dd},
      [&] { rasa_ext::launch_pack_backward(pointers, host.data(), table, param, nullptr); });
  release(table);
  const auto expect_untouched = [](const char* name, const Array& array) {
    for (int64_t i = 0; i < array.size(); ++i) {
      if (array[i] == array[i]) fail(std::string(name) + ": written");
    }
  };
  if (given.down) group.expect_down();
  if (given.up) group.expect_up();
  if (dots) group.expect_dots();
  if (!given.down) expect_untouched("dA", group.dA), expect_untouched("dA_pool", group.dA_pool);
  if (!given.up) expect_untouched("dB", group.dB), expect_untouched("dB_pool", group.dB_pool);
  if (!dots) expect_untouched("dd", group.dd);
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
                                  // More ranks than a tile has.
                                  {8, 12, 9, 10, 32},
                                  // Rows of one piece, slightly more, and several pieces.
                                  {256, 264, 2, 1, 4},
                                  {257, 255, 2, 2, 4},
                                  {520, 8, 1, 2, 3},
                                  {8, 520, 1, 2, 3},
                                  {0, 6, 3, 2, 16},
                                  {6, 0, 3, 2, 16},
                                  {4, 4, 0, 0, 0},
                                  // Rows slightly longer than a block takes at a time.
                                  {4, 1032, 1, 1, 2},
                                  {4, 1025, 1, 1, 2}};
  if (is_small()) {
    check_group(shapes[2], 1, DType::kFloat32, 1);
    check_group({33, 300, 3, 4, 16}, 2, DType::kBFloat16, 0);
    return;
  }
  std::vector<DType> params = dtypes();
  params.push_back(DType::kFloat64);
  for (const Shape& shape : shapes) {
    for (const DType param : params) {
      for (const int offset : {0, 1}) {
        for (const int count : {1, 2}) check_group(shape, count, param, offset);
      }
    }
  }
  for (const int count : {0, 3, rasa_ext::kLayersByValue, rasa_ext::kLayersByValue + 1}) {
    check_group({9, 8, 2, 1, 4}, count, DType::kFloat32, 0);
  }
  check_group({40, 24, 3, 4, 16}, 3, DType::kFloat32, 0, {true, true, true, true});
  for (const int count : {1, 2}) {
    check_group({40, 24, 3, 4, 16}, count, DType::kFloat32, 0, {true, false, true});
    check_group({40, 24, 3, 4, 16}, count, DType::kFloat32, 0, {false, true, true});
    check_group({40, 24, 3, 4, 16}, count, DType::kFloat32, 0, {true, true, false});
    check_group({40, 1, 3, 4, 16}, count, DType::kFloat32, 0, {true, true, false});
  }
}

}  // namespace check
