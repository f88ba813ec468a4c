// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011): random words from a key and a counter.
#pragma once

#include "platform.cuh"

namespace rasa_ext {

struct Words {
  uint32_t at[4];
};

// Returns block `counter` of the stream that `key` selects.
__device__ __forceinline__ Words philox(uint64_t key, uint64_t counter) {
  constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(kMultiply0, c0), low0 = kMultiply0 * c0;
    const uint32_t high1 = multiply_high(kMultiply1, c2), low1 = kMultiply1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace rasa_ext
