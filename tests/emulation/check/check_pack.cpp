#include <memory>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

using rasa_ext::PackLayer;

struct Shape {
  int in, out, own, pooled, Rp;
};

// One layer's arrays, and what must come of them.
struct Layer {
  Shape shape;
  Array A, A_pool, B, B_pool, d, Ap, Bp;

  Layer(const Shape& s, DType param, DType dtype, int offset)
      : shape(s),
        A(param, int64_t{s.own} * s.in, offset),
        A_pool(param, int64_t{s.pooled} * s.in, offset),
        B(param, int64_t{s.out} * s.own, offset),
        B_pool(param, int64_t{s.out} * s.pooled, offset),
        d(param, s.own + s.pooled, offset),
        Ap(dtype, int64_t{s.Rp} * s.in, offset),
        Bp(dtype, int64_t{s.Rp} * s.out, offset) {
    for (Array* input : {&A, &A_pool, &B, &B_pool, &d}) input->randomize();
  }

  PackLayer pointers() const {
    return {A.data(),  A_pool.data(), B.data(),  B_pool.data(), d.data(),     Ap.data(),
            Bp.data(), shape.in,      shape.out, shape.own,     shape.pooled, shape.Rp};
  }

  // `scaled`: whether d was given.
  void expect_packed(bool scaled) const {
    const auto stacked = [&](const Array& own, const Array& pool, int width, int64_t i) {
      const int64_t j = i / width, n = i % width;
      if (j < shape.own) return own[i];
      return j < shape.own + shape.pooled ? pool[(j - shape.own) * width + n] : 0.0;
    };
    expect_rounded("Ap", Ap, [&](int64_t i) { return stacked(A, A_pool, shape.in, i); });
    expect_rounded("Bp", Bp, [&](int64_t i) {
      const int64_t j = i / shape.out;
      const bool scales = scaled && j < shape.own + shape.pooled;
      return stacked(B, B_pool, shape.out, i) * (scales ? d[j] : 1.0);
    });
  }
};

void check_one(const Shape& shape, DType param, DType dtype, int offset, bool scaled = true) {
  begin_case("in " + std::to_string(shape.in) + " out " + std::to_string(shape.out) + " own " +
             std::to_string(shape.own) + " pooled " + std::to_string(shape.pooled) + " Rp " +
             std::to_string(shape.Rp) + " offset " + std::to_string(offset) + " " + name_of(param) +
             " to " + name_of(dtype));
  Layer layer(shape, param, dtype, offset);
  PackLayer pointers = layer.pointers();
  if (!scaled) pointers.d = nullptr;
  run_repeatedly("pack", {&layer.Ap, &layer.Bp},
                 [&] { rasa_ext::launch_pack(&pointers, nullptr, 1, param, dtype, nullptr); });
  layer.expect_packed(scaled);
}

// Layers of different shapes, most of them smaller than the first.
void check_many(DType param, DType dtype, const std::vector<Shape>& shapes) {
  begin_case(std::to_string(shapes.size()) + " layers " + name_of(param) + " to " + name_of(dtype));
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<Array*> outputs;
  std::vector<PackLayer> host;
  for (const Shape& shape : shapes) {
    layers.push_back(std::make_unique<Layer>(shape, param, dtype, 0));
    outputs.push_back(&layers.back()->Ap);
    outputs.push_back(&layers.back()->Bp);
    host.push_back(layers.back()->pointers());
  }
  const int count = static_cast<int>(host.size());
  const size_t bytes = host.size() * sizeof(PackLayer);
  auto* table =
      count > rasa_ext::kLayersByValue ? static_cast<PackLayer*>(allocate(bytes)) : nullptr;
  if (table != nullptr) std::copy(host.begin(), host.end(), table);
  run_repeatedly("pack", outputs,
                 [&] { rasa_ext::launch_pack(host.data(), table, count, param, dtype, nullptr); });
  release(table);
  for (const auto& layer : layers) layer->expect_packed(true);
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
                                  // Rows of a piece, of one and a bit, and of several.
                                  {256, 264, 2, 1, 4},
                                  {257, 255, 2, 1, 4},
                                  {520, 8, 1, 2, 3},
                                  {8, 1030, 1, 1, 2},
                                  {0, 6, 3, 2, 16},
                                  {6, 0, 3, 2, 16},
                                  {4, 4, 0, 0, 0}};
  if (is_small()) {
    for (int i = 0; i < 3; ++i) check_one(shapes[i], DType::kFloat32, DType::kBFloat16, i % 2);
    return;
  }
  for (const Shape& shape : shapes) {
    for (const DType param : dtypes()) {
      for (const DType dtype : dtypes()) {
        for (const int offset : {0, 1}) check_one(shape, param, dtype, offset);
      }
    }
    check_one(shape, DType::kFloat64, DType::kFloat64, 0);
    check_one(shape, DType::kFloat64, DType::kFloat64, 1);
  }
  for (const Shape& shape : {shapes[0], shapes[1]}) {
    check_one(shape, DType::kFloat32, DType::kBFloat16, 0, false);
  }
  for (const DType dtype : dtypes()) check_many(DType::kFloat32, dtype, shapes);
  check_many(DType::kFloat32, DType::kBFloat16, {});
  // As many as travel by value, and one more.
  std::vector<Shape> many(rasa_ext::kLayersByValue, {9, 5, 2, 1, 4});
  many[1] = shapes[0];
  many.back() = shapes[1];
  check_many(DType::kFloat32, DType::kBFloat16, many);
  many.push_back(shapes[2]);
  check_many(DType::kFloat32, DType::kBFloat16, many);
}

}  // namespace check
