#include <cmath>
#include <memory>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

using rasa_ext::PackBackwardLayer;
using rasa_ext::PoolGrads;

struct Shape {
  int in, out, own, pooled, Rp;
};

struct Layer {
  Shape shape;
  Array dAp, dBt, B, B_pool, d, dA, dB, dd;

  Layer(const Shape& s, DType param, int offset)
      : shape(s),
        dAp(accumulation(param), int64_t{s.Rp} * s.in, offset),
        dBt(accumulation(param), int64_t{s.Rp} * s.out, offset),
        B(param, int64_t{s.out} * s.own, offset),
        B_pool(param, int64_t{s.out} * s.pooled, offset),
        d(param, s.own + s.pooled, offset),
        dA(param, int64_t{s.own} * s.in, offset),
        dB(param, int64_t{s.out} * s.own, offset),
        dd(param, s.own + s.pooled, offset) {
    for (Array* input : {&dAp, &dBt, &B, &B_pool, &d}) input->randomize();
  }

  PackBackwardLayer pointers() const {
    return {dAp.data(), dBt.data(), B.data(), B_pool.data(), d.data(),  dA.data(),
            dB.data(),  dd.data(),  shape.in, shape.out,     shape.own, shape.pooled};
  }

  // T[n, j] of dBt by columns.
  double T(int64_t n, int64_t j) const { return dBt[j * shape.out + n]; }

  void expect_own() const {
    const int own = shape.own, pooled = shape.pooled;
    expect_rounded("dA", dA, [&](int64_t i) { return dAp[i]; });
    expect_rounded("dB", dB, [&](int64_t i) { return T(i / own, i % own) * d[i % own]; });
    std::vector<double> sum(own + pooled), terms(own + pooled);
    for (int j = 0; j < own + pooled; ++j) {
      for (int n = 0; n < shape.out; ++n) {
        const double b = j < own ? B[n * own + j] : B_pool[n * pooled + (j - own)];
        sum[j] += b * T(n, j);
        terms[j] += std::abs(b * T(n, j));
      }
    }
    expect(
        "dd", dd, [&](int64_t j) { return sum[j]; },
        [&](int64_t j) {
          // A lane's share of a tile, the lanes, the tiles: far fewer roundings than out.
          const double steps = 32 + shape.out / 1024.0;
          return terms[j] * steps * rounding(accumulation(dd.dtype())) +
                 std::abs(sum[j]) * rounding(dd.dtype()) + 0x1p-24;
        });
  }
};

// The pool's gradients, summed over layers.
void expect_pool(const std::vector<std::unique_ptr<Layer>>& layers, const Array& dA_pool,
                 const Array& dB_pool) {
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
      const double value = layer->T(i % shape.out, j) * layer->d[j];
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

void check_layers(const Shape& shape, int count, bool table_form, DType param, int offset) {
  begin_case(std::to_string(count) + (table_form ? " layers in " : " layer in ") +
             std::to_string(shape.in) + " out " + std::to_string(shape.out) + " own " +
             std::to_string(shape.own) + " pooled " + std::to_string(shape.pooled) + " Rp " +
             std::to_string(shape.Rp) + " offset " + std::to_string(offset) + " " + name_of(param));
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<PackBackwardLayer> host;
  Array dA_pool(param, int64_t{shape.pooled} * shape.in, offset);
  Array dB_pool(param, int64_t{shape.pooled} * shape.out, offset);
  std::vector<Array*> outputs{&dA_pool, &dB_pool};
  for (int i = 0; i < count; ++i) {
    layers.push_back(std::make_unique<Layer>(shape, param, offset));
    host.push_back(layers.back()->pointers());
    for (Array* output : {&layers[i]->dA, &layers[i]->dB, &layers[i]->dd}) {
      outputs.push_back(output);
    }
  }
  const size_t bytes =
      rasa_ext::pack_backward_workspace(count, shape.out, shape.own, shape.pooled, param);
  Array workspace(DType::kFloat32, static_cast<int64_t>(bytes / 4));
  outputs.push_back(&workspace);
  auto* table = static_cast<PackBackwardLayer*>(allocate(host.size() * sizeof(host[0])));
  std::copy(host.begin(), host.end(), table);
  const PoolGrads pool{dA_pool.data(), dB_pool.data()};
  run_repeatedly("pack_backward", outputs, [&] {
    if (table_form) {
      rasa_ext::launch_pack_layers_backward(host.data(), table, count, pool, workspace.data(),
                                            param, nullptr);
    } else {
      rasa_ext::launch_pack_backward(host[0], pool, workspace.data(), param, nullptr);
    }
  });
  release(table);
  workspace.check_guards("workspace");
  for (const auto& layer : layers) layer->expect_own();
  expect_pool(layers, dA_pool, dB_pool);
}

}  // namespace

void check_pack_backward() {
  const std::vector<Shape> shapes{
      {40, 24, 7, 32, 48},
      {33, 300, 7, 32, 39},
      {5, 257, 3, 4, 16},
      {64, 131, 0, 8, 16},
      {9, 5, 1, 0, 1},
      {24, 140, 8, 0, 16},
      {1040, 7, 4, 3, 16},
      {700, 3, 3, 2, 16},
      {16, 40, 28, 128, 160},
      {7, 130, 40, 9, 49},
      {0, 6, 3, 2, 16},
      // Borders of dA and of the pool's rows one element before and behind a block's.
      {241, 3, 17, 2, 32},
      {585, 3, 7, 1, 16},
      {1025, 3, 2, 3, 16},
      {6, 0, 3, 2, 16},
      {4, 4, 0, 0, 0},
      {4, 4300, 1, 1, 2}};
  if (is_small()) {
    check_layers(shapes[0], 1, false, DType::kFloat32, 1);
    check_layers(shapes[1], 2, true, DType::kBFloat16, 0);
    return;
  }
  std::vector<DType> params = dtypes();
  params.push_back(DType::kFloat64);
  for (const Shape& shape : shapes) {
    for (const DType param : params) {
      for (const int offset : {0, 1}) {
        check_layers(shape, 1, false, param, offset);
        check_layers(shape, 3, true, param, offset);
      }
    }
  }
  // More tiles than a warp has lanes.
  check_layers({2, 4300, 1, 1, 2}, 1, false, DType::kFloat32, 0);
}

}  // namespace check
