#include <cmath>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

struct Shape {
  int M, in, out, Rp;
};

void check_one(const Shape& shape, DType dtype, bool wants_U, int offset) {
  const int M = shape.M, in = shape.in, out = shape.out, Rp = shape.Rp;
  if (!rasa_ext::decode_fits(M, Rp, dtype)) fail("decode_fits says no");
  begin_case("M " + std::to_string(M) + " in " + std::to_string(in) + " out " +
             std::to_string(out) + " Rp " + std::to_string(Rp) + " offset " +
             std::to_string(offset) + " " + name_of(dtype));
  Array x(dtype, int64_t{M} * in, offset), Ap(dtype, int64_t{Rp} * in, offset);
  Array Bp(dtype, int64_t{Rp} * out, offset), base(dtype, int64_t{M} * out);
  for (Array* each : {&x, &Ap, &Bp, &base}) each->randomize();
  Array U(dtype, wants_U ? int64_t{M} * Rp : 0), y(dtype, int64_t{M} * out, offset);
  Array workspace(DType::kFloat32, static_cast<int64_t>(rasa_ext::decode_workspace(M, in, Rp) / 4));
  const rasa_ext::DecodeCall call{
      x.data(), Ap.data(), Bp.data(), wants_U ? U.data() : nullptr, y.data(), workspace.data(), M,
      in,       out,       Rp};
  run_repeatedly("decode", {&U, &workspace, &y}, [&] {
    for (int64_t i = 0; i < y.size(); ++i) y.set(i, base[i]);
    rasa_ext::launch_decode(call, dtype, nullptr);
  });
  workspace.check_guards("workspace");

  // U and the sums of |terms| of its elements, in float64.
  std::vector<double> wide(M * Rp), terms(M * Rp);
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < Rp; ++j) {
      for (int k = 0; k < in; ++k) {
        const double term = x[int64_t{m} * in + k] * Ap[int64_t{j} * in + k];
        wide[m * Rp + j] += term;
        terms[m * Rp + j] += std::abs(term);
      }
    }
  }
  // Roundings of one term: in a lane's share, over lanes, over parts; then over ranks.
  const double shrink = (in / 32.0 + 25) * 0x1p-24, expand = (Rp + 2) * 0x1p-24;
  if (wants_U) {
    expect(
        "U", U, [&](int64_t i) { return wide[i]; },
        [&](int64_t i) {
          return std::abs(wide[i]) * rounding(dtype) + terms[i] * shrink + 0x1p-24;
        });
  }
  const auto product = [&](const std::vector<double>& factors, int64_t i, bool absolute) {
    double all = 0;
    for (int j = 0; j < Rp; ++j) {
      const double b = Bp[int64_t{j} * out + i % out];
      all += factors[i / out * Rp + j] * (absolute ? std::abs(b) : b);
    }
    return all;
  };
  expect(
      "y", y, [&](int64_t i) { return base[i] + product(wide, i, false); },
      [&](int64_t i) {
        const double slack = product(terms, i, true) * (shrink + expand);
        return std::abs(base[i] + product(wide, i, false)) * (rounding(dtype) + 0x1p-24) + slack +
               0x1p-24;
      });
}

}  // namespace

void check_decode() {
  const std::vector<Shape> shapes{{1, 64, 33, 16},
                                  {3, 1100, 70, 48},
                                  {16, 40, 9, 39},
                                  {4, 17, 31, 7},
                                  {5, 2080, 20, 16},
                                  {8, 0, 5, 16},
                                  {2, 24, 0, 16},
                                  {9, 531, 40, 160},
                                  {1, 1600, 64, 8},
                                  {16, 8, 1, 1},
                                  {0, 8, 4, 16},
                                  {3, 8, 4, 0},
                                  {16, 40, 0, 5},
                                  // Several blocks for each row of y.
                                  {5, 72, 300, 16},
                                  {2, 600, 520, 20}};
  if (is_small()) {
    check_one({3, 1100, 70, 16}, DType::kBFloat16, true, 0);
    check_one({4, 17, 31, 7}, DType::kFloat32, true, 1);
    return;
  }
  for (const Shape& shape : shapes) {
    for (const DType dtype : dtypes()) {
      for (const int offset : {0, 1}) check_one(shape, dtype, offset == 0 && shape.Rp > 0, offset);
    }
  }
  // Ranks for which shared memory holds 4 tokens, and 1.
  check_one({8, 8, 5, 1600}, DType::kBFloat16, true, 0);
  check_one({2, 8, 4, 3100}, DType::kBFloat16, true, 0);
  // A block with a single column.
  check_one({2, 16, 257, 3}, DType::kBFloat16, true, 0);
  begin_case("decode_fits");
  if (rasa_ext::decode_fits(17, 16, DType::kFloat32)) fail("17 tokens fit");
  if (rasa_ext::decode_fits(1, 16, DType::kFloat64)) fail("float64 fits");
  if (rasa_ext::decode_fits(1, 12289, DType::kFloat32)) fail("48 KB and one element fit");
  if (!rasa_ext::decode_fits(16, 12288, DType::kFloat32)) fail("48 KB do not fit");
}

}  // namespace check
