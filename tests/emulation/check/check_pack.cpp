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
  Array A, A_pool, B, B_pool, d, Ap, Bt;

  Layer(const Shape& s, DType param, DType dtype, int offset)
      : shape(s),
        A(param, int64_t{s.own} * s.in, offset),
        A_pool(param, int64_t{s.pooled} * s.in, offset),
        B(param, int64_t{s.out} * s.own, offset),
        B_pool(param, int64_t{s.out} * s.pooled, offset),
        d(param, s.own + s.pooled, offset),
        Ap(dtype, int64_t{s.Rp} * s.in, offset),
        Bt(dtype, int64_t{s.out} * s.Rp, offset) {
    for (Array* input : {&A, &A_pool, &B, &B_pool, &d}) input->randomize();
  }

  PackLayer pointers() const {
    return {A.data(), A_pool.data(), B.data(),  B_pool.data(), d.data(), Ap.data(), Bt.data(),
            shape.in, shape.out,     shape.own, shape.pooled,  shape.Rp, 0};
  }

  void expect_packed() const {
    const int in = shape.in, own = shape.own, R = own + shape.pooled, Rp = shape.Rp;
    expect_rounded("Ap", Ap, [&](int64_t i) {
      const int64_t j = i / in, k = i % in;
      return j < own ? A[i] : j < R ? A_pool[(j - own) * in + k] : 0.0;
    });
    expect_rounded("Bt", Bt, [&](int64_t i) {
      const int64_t n = i / Rp, j = i % Rp;
      if (j >= R) return 0.0;
      return d[j] * (j < own ? B[n * own + j] : B_pool[n * shape.pooled + (j - own)]);
    });
  }
};

void check_one(const Shape& shape, DType param, DType dtype, int offset) {
  begin_case("in " + std::to_string(shape.in) + " out " + std::to_string(shape.out) + " own " +
             std::to_string(shape.own) + " pooled " + std::to_string(shape.pooled) + " Rp " +
             std::to_string(shape.Rp) + " offset " + std::to_string(offset) + " " + name_of(param) +
             " to " + name_of(dtype));
  Layer layer(shape, param, dtype, offset);
  run_repeatedly("pack", {&layer.Ap, &layer.Bt},
                 [&] { rasa_ext::launch_pack(layer.pointers(), param, dtype, nullptr); });
  layer.expect_packed();
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
    outputs.push_back(&layers.back()->Bt);
    host.push_back(layers.back()->pointers());
  }
  auto* table = static_cast<PackLayer*>(allocate(host.size() * sizeof(PackLayer)));
  std::copy(host.begin(), host.end(), table);
  run_repeatedly("pack_layers", outputs, [&] {
    rasa_ext::launch_pack_layers(host.data(), table, static_cast<int>(host.size()), param, dtype,
                                 nullptr);
  });
  release(table);
  for (const auto& layer : layers) layer->expect_packed();
}

}  // namespace

void check_pack() {
  const std::vector<Shape> shapes{{40, 24, 7, 32, 48},
                                  {33, 17, 7, 32, 39},
                                  {5, 300, 3, 4, 16},
                                  {64, 131, 0, 8, 16},
                                  {9, 5, 1, 0, 1},
                                  {24, 40, 8, 0, 16},
                                  {1040, 7, 4, 3, 16},
                                  {700, 3, 5, 2, 16},
                                  {16, 2, 28, 128, 160},
                                  {3, 3, 5, 1200, 1216},
                                  {2, 2, 1100, 5, 1105},
                                  {0, 6, 3, 2, 16},
                                  // Borders of A, the pool and the pads one element before and
                                  // behind a block's; one pooled rank; one pad.
                                  {241, 3, 17, 2, 32},
                                  {585, 3, 7, 1, 16},
                                  {241, 3, 8, 9, 32},
                                  {585, 3, 3, 4, 16},
                                  {20, 9, 7, 8, 16},
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
  for (const DType dtype : dtypes()) check_many(DType::kFloat32, dtype, shapes);
  check_many(DType::kFloat32, DType::kBFloat16, {});
}

}  // namespace check
