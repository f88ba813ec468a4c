#include <algorithm>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

using rasa_ext::SkinnyCall;

struct Shape {
  int M, N, Rp;
  bool down, grad, masked;
  int gap = 0;  // elements between rows and before the first row: a multiple of 8
};

// The tensors of one call; rows of S, P, Q and D have gaps of `gap` elements.
struct Tensors {
  Shape shape;
  Array S, P, Q, D, C, workspace;
  uint8_t* mask;

  Tensors(const Shape& s, DType dtype)
      : shape(s),
        S(dtype, rows(s.M, s.N), s.gap),
        P(dtype, rows(s.Rp, s.N), s.gap),
        Q(dtype, rows(s.M, s.Rp), s.gap),
        D(dtype, s.down ? rows(s.M, s.Rp) : 0, s.gap),
        C(DType::kFloat32, s.grad ? int64_t{s.Rp} * s.N : 0),
        workspace(DType::kFloat32, static_cast<int64_t>(rasa_ext::skinny_workspace(call()) / 4)),
        mask(nullptr) {
    for (Array* each : {&S, &P, &Q}) each->randomize();
    if (!s.masked) return;
    const int64_t bytes = rasa_ext::dropout_mask_bytes(int64_t{s.M} * s.N);
    mask = static_cast<uint8_t*>(allocate(bytes));
    for (int64_t i = 0; i < bytes; ++i) mask[i] = static_cast<uint8_t>(i * i * 77 + i * 31 + 9);
    // Dropped elements count as zero, even if they are infinite.
    for (int64_t e = 0; e < int64_t{s.M} * s.N; e += 13) {
      if (!kept(e)) S.set(e / s.N * (s.N + s.gap) + e % s.N, HUGE_VAL);
    }
  }
  ~Tensors() {
    if (mask != nullptr) release(mask);
  }

  int64_t rows(int64_t count, int width) const {
    return count * (width + shape.gap) - shape.gap;  // no gap after the last row
  }
  bool kept(int64_t e) const { return mask == nullptr || (mask[e / 8] >> (e % 8) & 1) != 0; }
  double seen(int m, int n) const {
    return kept(int64_t{m} * shape.N + n) ? S[int64_t{m} * (shape.N + shape.gap) + n] : 0.0;
  }

  SkinnyCall call() const {
    const int64_t wide = shape.N + shape.gap, narrow = shape.Rp + shape.gap;
    const void* no = nullptr;
    return {S.data(),
            wide,
            shape.masked ? mask : nullptr,
            shape.down ? P.data() : no,
            wide,
            D.data(),
            narrow,
            1.375,
            shape.grad ? Q.data() : no,
            narrow,
            C.data(),
            workspace.data(),
            shape.M,
            shape.N,
            shape.Rp};
  }
};

// Compares with a product summed in float64, within float32 rounding errors of the terms.
void expect_products(const std::string& name, const Array& actual, int rows, int cols, int gap,
                     double scale, int inner, const std::function<double(int, int, int)>& term) {
  std::vector<double> sum(int64_t{rows} * cols), size(sum.size());
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      for (int k = 0; k < inner; ++k) {
        const double one = scale * term(i, j, k);
        sum[int64_t{i} * cols + j] += one;
        size[int64_t{i} * cols + j] += std::abs(one);
      }
    }
  }
  const auto place = [&](int64_t i) { return i / (cols + gap) * cols + i % (cols + gap); };
  for (int64_t i = 0; i < actual.size(); ++i) {
    if (i % (cols + gap) >= cols) {  // between two rows
      if (actual[i] == actual[i]) fail(name + ": written between its rows");
      continue;
    }
    const double want = sum[place(i)], got = actual[i];
    // One rounding for each product of 16 terms, and for each partial sum. The emulation needs 7 %
    // of this limit, but a GPU's tensor cores may truncate instead of rounding.
    const double slack = size[place(i)] * (inner / 16 + 4) * 0x1p-24;
    if (!(std::abs(got - want) <= slack + std::abs(want) * rounding(actual.dtype()) * 1.01)) {
      fail(name + "[" + std::to_string(i) + "]: expected " + std::to_string(want) + ", got " +
           std::to_string(got));
    }
  }
  actual.check_guards(name);
}

void check_one(const Shape& s, DType dtype) {
  begin_case("M " + std::to_string(s.M) + " N " + std::to_string(s.N) + " Rp " +
             std::to_string(s.Rp) + (s.down ? " down" : "") + (s.grad ? " grad" : "") +
             (s.masked ? " masked" : "") + " gap " + std::to_string(s.gap) + " " + name_of(dtype));
  Tensors t(s, dtype);
  if (!rasa_ext::skinny_fits(t.call(), dtype)) fail("skinny_fits says no");
  run_repeatedly("skinny", {&t.D, &t.C, &t.workspace},
                 [&] { rasa_ext::launch_skinny(t.call(), dtype, nullptr); });
  t.workspace.check_guards("workspace");
  if (s.down) {
    expect_products("D", t.D, s.M, s.Rp, s.gap, 1.375, s.N, [&](int m, int j, int n) {
      return t.seen(m, n) * t.P[int64_t{j} * (s.N + s.gap) + n];
    });
  }
  if (s.grad) {
    expect_products("C", t.C, s.Rp, s.N, 0, 1, s.M, [&](int j, int n, int m) {
      return t.seen(m, n) * t.Q[int64_t{m} * (s.Rp + s.gap) + j];
    });
  }
}

void expect_fits(bool expected, const std::string& what, DType dtype,
                 const std::function<void(SkinnyCall&)>& change) {
  begin_case("skinny_fits: " + what);
  alignas(16) static char memory[64];
  SkinnyCall call{memory, 64, nullptr, memory, 64, memory, 48, 1,
                  memory, 48, memory,  memory, 8,  64,     48};
  change(call);
  if (rasa_ext::skinny_fits(call, dtype) != expected) fail("the other answer");
}

void check_fits() {
  const DType brain = DType::kBFloat16;
  static uint8_t mask[8];
  const auto unchanged = [](SkinnyCall&) {};
  expect_fits(true, "bfloat16", brain, unchanged);
  expect_fits(false, "float32", DType::kFloat32, unchanged);
  expect_fits(false, "float64", DType::kFloat64, unchanged);
  expect_fits(true, "160 ranks", brain, [](SkinnyCall& c) { c.Rp = 160; });
  expect_fits(false, "176 ranks", brain, [](SkinnyCall& c) { c.Rp = 176; });
  expect_fits(false, "40 ranks", brain, [](SkinnyCall& c) { c.Rp = 40; });
  expect_fits(false, "no ranks", brain, [](SkinnyCall& c) { c.Rp = 0; });
  expect_fits(false, "no tokens", brain, [](SkinnyCall& c) { c.M = 0; });
  expect_fits(true, "one token", brain, [](SkinnyCall& c) { c.M = 1; });
  expect_fits(false, "no features", brain, [](SkinnyCall& c) { c.N = 0; });
  expect_fits(true, "8 features", brain, [](SkinnyCall& c) { c.N = 8; });
  expect_fits(false, "60 features", brain, [](SkinnyCall& c) { c.N = 60; });
  expect_fits(true, "40 features", brain, [](SkinnyCall& c) { c.N = 40; });
  expect_fits(false, "40 masked", brain, [](SkinnyCall& c) { c.N = 40, c.mask = mask; });
  expect_fits(true, "32 masked", brain, [](SkinnyCall& c) { c.N = 32, c.mask = mask; });
  expect_fits(false, "a crooked mask", brain, [](SkinnyCall& c) { c.mask = mask + 2; });
  for (const auto& [what, which] :
       {std::pair{"S", &SkinnyCall::S}, {"P", &SkinnyCall::P}, {"Q", &SkinnyCall::Q}}) {
    const auto member = which;
    expect_fits(false, std::string("a crooked ") + what, brain,
                [member](SkinnyCall& c) { c.*member = static_cast<const char*>(c.*member) + 8; });
  }
  for (int64_t SkinnyCall::* stride : {&SkinnyCall::S_stride, &SkinnyCall::P_stride,
                                       &SkinnyCall::Q_stride, &SkinnyCall::D_stride}) {
    expect_fits(false, "a crooked stride", brain, [stride](SkinnyCall& c) { c.*stride += 4; });
  }
}

}  // namespace

void check_skinny() {
  check_fits();
  const DType brain = DType::kBFloat16;
  check_one({70, 96, 16, true, false, true}, brain);
  check_one({70, 160, 16, false, true, true}, brain);
  check_one({40, 264, 32, true, true, false}, brain);
  if (is_small()) return;
  const std::vector<Shape> shapes{
      // Several parts of the features; ranks equal to 48, 96 and 160, and smaller ones.
      {130, 584, 48, true, false, false, 8},
      {9, 1632, 64, true, false, true, 8},  // six parts, more than are in flight at once
      {150, 64, 96, true, false, true},
      {129, 1032, 112, true, false, false},
      {20, 544, 160, true, false, true, 24},
      // Several groups of tokens, and one.
      {520, 136, 48, false, true, false, 8},
      {515, 64, 16, false, true, true},
      {65, 128, 80, false, true, true, 8},
      {200, 288, 144, false, true, true},
      {1, 8, 160, false, true, false, 16},
      // Both products from one read; from two with a mask or many ranks.
      {300, 264, 48, true, true, false, 8},
      {257, 512, 96, true, true, false},
      {33, 8, 80, true, true, false, 24},
      {130, 320, 32, true, true, true},
      {70, 264, 112, true, true, false},
      {1, 16, 16, true, true, false},
      {31, 1000, 16, true, true, false}};
  for (const Shape& shape : shapes) {
    for (const DType dtype : dtypes()) {
      if (dtype != DType::kFloat32) check_one(shape, dtype);
    }
  }
}

}  // namespace check
