// dropout: draws a mask of bits from a counter, and applies it to a tensor.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "philox.cuh"

namespace rasa_ext {

static_assert(kDropoutElements == 8, "a Philox block of 16-bit words is a byte of the mask");
static_assert(kDropoutBytes == 4, "four lanes exchange four bytes each");

// Returns the index of the v-th mask byte that this thread handles. A warp handles kDropoutBytes *
// kWarp consecutive bytes, and neighbouring lanes handle neighbouring bytes.
__device__ __forceinline__ int64_t byte_of(int v, int lane) {
  const int64_t warp = int64_t{blockIdx.x} * (kStreamThreads / kWarp) + threadIdx.x / kWarp;
  return (warp * kDropoutBytes + v) * kWarp + lane;
}

// Transposes the bytes of four neighbouring lanes: the lane at place v among them gets byte v of
// each lane, in lane order. These four bytes are consecutive in memory.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t bytes) {
  const uint32_t near = shuffle_xor(bytes, 1);
  bytes = threadIdx.x & 1 ? (bytes & 0xff00ff00) | (near >> 8 & 0x00ff00ff)
                          : (bytes & 0x00ff00ff) | (near & 0x00ff00ff) << 8;
  const uint32_t far = shuffle_xor(bytes, 2);
  return threadIdx.x & 2 ? (bytes & 0xffff0000) | far >> 16 : (bytes & 0x0000ffff) | far << 16;
}

// Draws the mask. Sixteen bits per element are enough for any p in use, and take half the
// multiplications of 32.
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    dropout_kernel(const uint64_t* noise,  // (2,): key, offset
                   uint8_t* mask,          // ((n + 7) / 8,), aligned to 4 bytes
                   int64_t n,
                   uint32_t threshold) {  // a 16-bit word below it drops the element
  const uint64_t key = noise[0], offset = noise[1];
  const int lane = threadIdx.x % kWarp;
  uint32_t bytes = 0;
#pragma unroll
  for (int v = 0; v < kDropoutBytes; ++v) {
    const Words words = philox(key, offset + static_cast<uint64_t>(byte_of(v, lane)));
#pragma unroll
    for (int e = 0; e < kDropoutElements; ++e) {
      const uint32_t word = words.at[e / 2] >> (e % 2 * 16) & 0xffff;
      bytes |= static_cast<uint32_t>(word >= threshold) << (8 * v + e);
    }
  }
  // Each warp makes one store of 128 bytes.
  bytes = transpose_bytes(bytes);
  const int64_t first = byte_of(lane % kDropoutBytes, lane / kDropoutBytes * kDropoutBytes);
  const int64_t end = (n + kDropoutElements - 1) / kDropoutElements;
  if (first + kDropoutBytes <= end) return store_aligned(mask + first, bytes);
#pragma unroll 1  // rarely taken
  for (int64_t i = first; i < end; ++i) mask[i] = static_cast<uint8_t>(bytes >> (i - first) * 8);
}

// x_dropped = x for elements that the mask keeps, and 0 for all others, even NaN. Issues four
// 16-byte loads at a time, before any mask bits are read. Reads before it writes, so that x_dropped
// may be x.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    keep_kernel(const T* x,           // (n,)
                const uint8_t* mask,  // ((n + 7) / 8,)
                T* x_dropped,         // (n,)
                int64_t n) {
  constexpr int N = kDropoutElements, kCount = kDropoutBytes * 2 / static_cast<int>(sizeof(T));
  const int lane = threadIdx.x % kWarp;
  const bool aligned = is_aligned(x) && is_aligned(x_dropped);
#pragma unroll
  for (int start = 0; start < kDropoutBytes; start += kCount) {
    Vector<T, N> value[kCount];
    unsigned bits[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int64_t first = byte_of(start + v, lane) * N;
      if (aligned && first + N <= n) value[v] = load<N>(x + first);
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int64_t byte = byte_of(start + v, lane);
      bits[v] = byte * N < n ? mask[byte] : 0u;
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int64_t first = byte_of(start + v, lane) * N;
      if (aligned && first + N <= n) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (!(bits[v] >> e & 1)) value[v].at[e] = narrow<T>(0);
        }
        store(x_dropped + first, value[v]);
        continue;
      }
#pragma unroll 1  // rarely taken
      for (int64_t i = first; i < min(first + N, n); ++i) {
        x_dropped[i] = bits[v] >> (i - first) & 1 ? x[i] : narrow<T>(0);
      }
    }
  }
}

}  // namespace rasa_ext
