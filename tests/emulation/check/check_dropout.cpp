#include <algorithm>
#include <cmath>
#include <cstring>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

// Philox 4x32-10 by the paper, on 64-bit products; word `which` of block `counter`.
uint32_t philox_word(uint64_t key, uint64_t counter, int which) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c[which];
}

struct Case {
  int64_t n;
  double p;
  uint64_t seed, offset;
};

void check_one(const Case& c, DType dtype, int offset) {
  begin_case("n " + std::to_string(c.n) + " p " + std::to_string(c.p) + " offset " +
             std::to_string(offset) + " " + name_of(dtype));
  Array x(dtype, c.n, offset), x_drop(dtype, c.n, offset);
  Array grad(dtype, c.n, offset), before(dtype, c.n), dx(dtype, c.n, offset);
  for (Array* input : {&x, &grad, &before}) input->randomize();
  if (c.n > 2) x.set(2, HUGE_VAL);
  const auto mask_bytes = static_cast<int64_t>(rasa_ext::dropout_mask_bytes(c.n));
  std::vector<uint8_t> expected_mask(mask_bytes);
  const auto kept = [&](int64_t e) {
    const double word = philox_word(c.seed, c.offset + e / 4, static_cast<int>(e % 4));
    return c.p < 1 && word >= std::round(c.p * 0x1p32);
  };
  for (int64_t e = 0; e < c.n; ++e) {
    expected_mask[e / 8] = static_cast<uint8_t>(expected_mask[e / 8] | kept(e) << (e % 8));
  }
  auto* words = static_cast<uint64_t*>(allocate(2 * sizeof(uint64_t)));
  words[0] = c.seed;
  words[1] = c.offset;
  auto* mask = static_cast<uint8_t*>(allocate(mask_bytes));
  const rasa_ext::DropoutDraw draw{words, c.p};
  const double scale = c.p < 1 ? 1 / (1 - c.p) : 0;

  for (const bool wants_mask : {true, false}) {
    run_repeatedly("dropout", {&x_drop}, [&] {
      std::memset(mask, 0xa5, mask_bytes);
      rasa_ext::launch_dropout(x.data(), x_drop.data(), wants_mask ? mask : nullptr, c.n, draw,
                               dtype, nullptr);
    });
    if (wants_mask && !std::equal(expected_mask.begin(), expected_mask.end(), mask)) fail("mask");
    for (int64_t e = 0; e < c.n; ++e) {
      if (std::isinf(x[e]) && x_drop[e] != (kept(e) && scale > 0 ? HUGE_VAL : 0)) fail("infinity");
    }
    Array finite(dtype, c.n);
    for (int64_t e = 0; e < c.n; ++e) finite.set(e, std::isinf(x[e]) ? 0 : x_drop[e]);
    expect(
        "x_drop", finite,
        [&](int64_t e) { return kept(e) && !std::isinf(x[e]) ? x[e] * scale : 0.0; },
        [&](int64_t e) {
          return kept(e) ? std::abs(x[e]) * scale * (rounding(dtype) + 0x1p-23) + 0x1p-24 : 0.0;
        });
    x_drop.check_guards("x_drop");
  }
  std::copy(expected_mask.begin(), expected_mask.end(), mask);
  for (const bool reads_mask : {true, false}) {
    run_repeatedly("dropout_backward", {&dx}, [&] {
      for (int64_t e = 0; e < c.n; ++e) dx.set(e, before[e]);
      rasa_ext::launch_dropout_backward(grad.data(), dx.data(), reads_mask ? mask : nullptr, c.n,
                                        draw, dtype, nullptr);
    });
    const auto want = [&](int64_t e) { return before[e] + (kept(e) ? grad[e] * scale : 0.0); };
    expect("dx", dx, want, [&](int64_t e) {
      const double terms = std::abs(before[e]) + std::abs(grad[e]) * scale;
      return std::abs(want(e)) * rounding(dtype) + terms * 0x1p-22 + 0x1p-24;
    });
  }
  release(mask);
  release(words);
}

}  // namespace

void check_dropout() {
  const uint64_t seed = 0x9abcdef012345678u;
  const std::vector<Case> cases{{1000, 0.05, seed, 0},  {4096, 0.5, 7, 12},   {7, 0.3, seed, 3},
                                {4104, 0.9, 1, 1},      {64, 0.0, seed, 0},   {65, 1.0, seed, 0},
                                {2049, 0.25, 0, ~0ull}, {333, 0.1, ~0ull, 5}, {0, 0.5, 1, 1}};
  if (is_small()) return check_one(cases[0], DType::kBFloat16, 0);
  std::vector<DType> all = dtypes();
  all.push_back(DType::kFloat64);
  // A word that is the threshold is kept, one that is less by one is not; in both halves of a byte.
  for (const int word : {0, 4}) {
    const uint32_t drawn = philox_word(seed, word / 4, word % 4);
    check_one({8, drawn * 0x1p-32, seed, 0}, DType::kFloat32, 0);
    check_one({8, (drawn + 1) * 0x1p-32, seed, 0}, DType::kFloat32, 0);
  }
  check_one({15, 0, seed, 0}, DType::kFloat32, 0);  // the bit behind the last is not set
  for (const Case& c : cases) {
    for (const DType dtype : all) {
      for (const int offset : {0, 1}) check_one(c, dtype, offset);
    }
  }
}

}  // namespace check
