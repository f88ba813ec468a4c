#include <algorithm>
#include <cmath>
#include <cstring>

#include "arrays.h"
#include "checks.h"
#include "launchers.h"

namespace check {
namespace {

// Philox 4x32-10 by the paper, with 64-bit products: 32-bit word `which` of block `counter`.
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

// The 16 random bits for element e.
uint32_t bits_of(uint64_t key, uint64_t offset, int64_t e) {
  const uint32_t word = philox_word(key, offset + e / 8, static_cast<int>(e % 8 / 2));
  return e % 2 ? word >> 16 : word & 0xffff;
}

struct Case {
  int64_t n;
  double p;
  uint64_t key, offset;
};

void expect_kept(const Array& x, const uint8_t* mask, const Array& kept) {
  for (int64_t e = 0; e < x.size(); ++e) {
    const double expected = mask[e / 8] >> (e % 8) & 1 ? x[e] : 0.0;
    if (kept[e] != expected) fail("kept, element " + std::to_string(e));
  }
  kept.check_guards("kept");
}

// Bytes after the mask that must not change.
constexpr int64_t kGuard = 8;

void check_drawn(const Case& c) {
  begin_case("n " + std::to_string(c.n) + " p " + std::to_string(c.p));
  const int64_t bytes = rasa_ext::dropout_mask_bytes(c.n);
  auto* noise = static_cast<uint64_t*>(allocate(2 * sizeof(uint64_t)));
  noise[0] = c.key;
  noise[1] = c.offset;
  auto* mask = static_cast<uint8_t*>(allocate(bytes + kGuard));
  run_repeatedly("dropout", {}, [&] {
    std::memset(mask, 0xa5, bytes + kGuard);
    rasa_ext::launch_dropout(noise, mask, c.n, c.p, nullptr);
    finish();
    for (int64_t e = 0; e < c.n; ++e) {
      const bool is_kept = bits_of(c.key, c.offset, e) >= std::min(c.p * 0x1p16, 65535.0);
      if ((mask[e / 8] >> (e % 8) & 1) != is_kept) fail("element " + std::to_string(e));
    }
    for (int64_t i = 0; i < kGuard; ++i) {
      if (mask[bytes + i] != 0xa5) fail("behind the mask, byte " + std::to_string(i));
    }
  });
  release(mask);
  release(noise);
}

void check_kept(int64_t n, DType dtype, int x_offset, int kept_offset) {
  begin_case("n " + std::to_string(n) + " offsets " + std::to_string(x_offset) + " " +
             std::to_string(kept_offset) + " " + name_of(dtype));
  Array x(dtype, n, x_offset), kept(dtype, n, kept_offset);
  x.randomize();
  if (n > 2) x.set(2, HUGE_VAL);
  const int64_t bytes = rasa_ext::dropout_mask_bytes(n);
  auto* mask = static_cast<uint8_t*>(allocate(bytes));
  for (int64_t i = 0; i < bytes; ++i) mask[i] = static_cast<uint8_t>(i * 77 + n * 31 + 9);
  run_repeatedly("keep", {&kept},
                 [&] { rasa_ext::launch_keep(x.data(), mask, kept.data(), n, dtype, nullptr); });
  expect_kept(x, mask, kept);
  run_repeatedly("keep in place", {&kept}, [&] {
    for (int64_t e = 0; e < n; ++e) kept.set(e, x[e]);
    rasa_ext::launch_keep(kept.data(), mask, kept.data(), n, dtype, nullptr);
  });
  expect_kept(x, mask, kept);
  release(mask);
}

}  // namespace

void check_dropout() {
  const uint64_t key = 0x9abcdef012345678u;
  check_drawn({1000, 0.25, key, 0});
  check_kept(1000, DType::kBFloat16, 0, 0);
  if (is_small()) return;
  for (const Case& c : {Case{4096, 0.5, 7, 12},
                        {7, 0.25, key, 3},
                        {4104, 0.75, 1, 1},
                        {64, 0, key, 0},
                        {65, 0x1p-16, key, 0},
                        {2049, 0.125, 0, ~0ull},
                        {333, 0.375, ~0ull, 5},
                        {0, 0.5, 1, 1},
                        {1 << 16, 1, key, 9}}) {
    check_drawn(c);
  }
  // An element is kept if its bits equal the threshold, and dropped if they are one less.
  for (int64_t e = 0; e < 8; ++e) {
    check_drawn({8, bits_of(key, 0, e) * 0x1p-16, key, 0});
    check_drawn({8, (bits_of(key, 0, e) + 1) * 0x1p-16, key, 0});
  }
  std::vector<DType> all = dtypes();
  all.push_back(DType::kFloat64);
  // A lane's bytes are 256 elements apart, a warp has 1024, a block 8192. With 9 elements, the
  // mask's last byte keeps its only element; 56 elements are one byte less than a whole store.
  for (const int64_t n : {0, 1, 7, 8, 9, 15, 31, 32, 56, 255, 256, 264, 1024, 2049, 4099, 8200}) {
    check_drawn({n, 0.5, key, 1});
    for (const DType dtype : all) {
      for (const int offset : {0, 1}) {
        check_kept(n, dtype, offset, offset);
        check_kept(n, dtype, offset, 1 - offset);
      }
    }
  }
}

}  // namespace check
