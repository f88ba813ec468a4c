#include <memory>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

using rasa_ext::PackGroup;
using rasa_ext::PackLayer;

struct Shape {
  int in, out, own, pooled, Rp;
};

struct Layer {
  Array A, B, d;

  Layer(const Shape& s, DType param, int offset)
      : A(param, int64_t{s.own} * s.in, offset),
        B(param, int64_t{s.out} * s.own, offset),
        d(param, s.own + s.pooled, offset) {
    for (Array* input : {&A, &B, &d}) input->randomize();
  }
};

// Checks the packs of layers of one shape with a shared pool. `scaled`: whether d is given.
void check_group(const Shape& shape, int count, DType param, DType dtype, int offset,
                 bool scaled = true) {
  begin_case(std::to_string(count) + " layers in " + std::to_string(shape.in) + " out " +
             std::to_string(shape.out) + " own " + std::to_string(shape.own) + " pooled " +
             std::to_string(shape.pooled) + " Rp " + std::to_string(shape.Rp) + " offset " +
             std::to_string(offset) + " " + name_of(param) + " to " + name_of(dtype));
  const int64_t in = shape.in, out = shape.out;
  Array A_pool(param, shape.pooled * in, offset), B_pool(param, shape.pooled * out, offset);
  Array Ap(dtype, count * shape.Rp * in, offset), Bp(dtype, count * shape.Rp * out, offset);
  for (Array* input : {&A_pool, &B_pool}) input->randomize();
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<PackLayer> host;
  for (int i = 0; i < count; ++i) {
    const Layer& layer = *layers.emplace_back(std::make_unique<Layer>(shape, param, offset));
    host.push_back({layer.A.data(), layer.B.data(), scaled ? layer.d.data() : nullptr});
  }
  const PackGroup group{A_pool.data(), B_pool.data(), Ap.data(), Bp.data(),    count,
                        shape.in,      shape.out,     shape.own, shape.pooled, shape.Rp};
  auto* table = count > rasa_ext::kLayersByValue
                    ? static_cast<PackLayer*>(allocate(host.size() * sizeof(PackLayer)))
                    : nullptr;
  if (table != nullptr) std::copy(host.begin(), host.end(), table);
  run_repeatedly("pack", {&Ap, &Bp},
                 [&] { rasa_ext::launch_pack(group, host.data(), table, param, dtype, nullptr); });
  release(table);
  const int rank = shape.own + shape.pooled;
  expect_rounded("Ap", Ap, [&](int64_t i) {
    const int64_t row = i / in, j = row % shape.Rp;
    if (j < shape.own) return layers[row / shape.Rp]->A[j * in + i % in];
    return j < rank ? A_pool[(j - shape.own) * in + i % in] : 0.0;
  });
  expect_rounded("Bp", Bp, [&](int64_t i) {
    const int64_t row = i / out, j = row % shape.Rp;
    const Layer& layer = *layers[row / shape.Rp];
    if (j >= rank) return 0.0;
    const bool own = j < shape.own;
    const double B =
        own ? layer.B[i % out * shape.own + j] : B_pool[i % out * shape.pooled + j - shape.own];
    return B * (scaled ? layer.d[j] : 1.0);
  });
}

}  // namespace

void check_pack() {
  const std::vector<Shape> shapes{{40, 24, 7, 32, 48},
                                  {33, 17, 7, 32, 39},
                                  {5, 300, 3, 4, 16},
                                  {64, 131, 0, 8, 16},
                                  {9, 5, 1, 0, 1},
                                  {24, 40, 8, 0, 16},
                                  {16, 2, 28, 128, 160},
                                  // More ranks than a tile has, and groups of padding alone.
                                  {12, 20, 9, 8, 34},
                                  // Rows of one piece, slightly more, and several pieces.
                                  {256, 264, 2, 1, 4},
                                  {257, 255, 2, 1, 4},
                                  {520, 8, 1, 2, 3},
                                  {8, 1030, 1, 1, 2},
                                  {0, 6, 3, 2, 16},
                                  {6, 0, 3, 2, 16},
                                  {4, 4, 0, 0, 0}};
  if (is_small()) {
    for (int i = 0; i < 3; ++i) {
      check_group(shapes[i], 1 + i % 2, DType::kFloat32, DType::kBFloat16, i % 2);
    }
    return;
  }
  for (const Shape& shape : shapes) {
    for (const int offset : {0, 1}) {
      for (const DType param : dtypes()) {
        for (const DType dtype : dtypes()) {
          for (const int count : {1, 3}) check_group(shape, count, param, dtype, offset);
        }
      }
      check_group(shape, 2, DType::kFloat64, DType::kFloat64, offset);
    }
  }
  for (const Shape& shape : {shapes[0], shapes[1]}) {
    check_group(shape, 2, DType::kFloat32, DType::kBFloat16, 0, false);
  }
  // No layers, as many as are passed by value, and one more.
  for (const int count : {0, rasa_ext::kLayersByValue, rasa_ext::kLayersByValue + 1}) {
    check_group({9, 5, 2, 1, 4}, count, DType::kFloat32, DType::kBFloat16, 0);
  }
}

}  // namespace check
