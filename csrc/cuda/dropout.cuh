// dropout: a mask of bits drawn from a counter, and what a mask leaves of a tensor.
#pragma once

#include "heuristics.cuh"
#include "philox.cuh"

namespace rasa_ext {

static_assert(kDropoutElements == 8, "a Philox block of 16-bit words is a byte of the mask");

// One byte of the mask to a thread. Sixteen bits an element are enough for any p that is used, and
// with 32 the kernel would take twice as long: it waits for multiplications, not for memory.
inline __global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    dropout_mask_kernel(const uint64_t* noise,  // (2,): key, offset
                        uint8_t* mask,          // (bytes,)
                        int64_t bytes,
                        uint32_t threshold) {  // a 16-bit word below it drops
  const int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (byte >= bytes) return;
  const Words words = philox(noise[0], noise[1] + static_cast<uint64_t>(byte));
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < kDropoutElements; ++v) {
    const uint32_t word = words.at[v / 2] >> (v % 2 * 16) & 0xffff;
    bits |= static_cast<unsigned>(word >= threshold) << v;
  }
  mask[byte] = static_cast<uint8_t>(bits);
}

// kept = x where the mask says so, else 0 whatever x is; eight elements to a thread, which reads
// them before it writes, so that kept may be x.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    dropout_kernel(const T* x,           // (n,)
                   const uint8_t* mask,  // ((n + 7) / 8,)
                   T* kept,              // (n,)
                   int64_t n) {
  constexpr int N = kDropoutElements;
  const int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = byte * N;
  if (first >= n) return;
  const unsigned bits = mask[byte];
  if (first + N <= n && is_aligned(x + first) && is_aligned(kept + first)) {
    Vector<T, N> value = load<N>(x + first);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      if (!(bits >> v & 1)) value.at[v] = narrow<T>(0);
    }
    return store(kept + first, value);
  }
  const int64_t end = min(first + N, n);
  for (int64_t i = first; i < end; ++i) {
    kept[i] = bits >> (i - first) & 1 ? x[i] : narrow<T>(0);
  }
}

}  // namespace rasa_ext
