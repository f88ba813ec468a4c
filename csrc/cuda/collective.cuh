// Operations of a block or a warp: read or write a row, and add up.
#pragma once

#include "numbers.cuh"

namespace rasa_ext {

constexpr int kWarp = 32;

// Elements that a thread takes at a time when rows of type A become rows of type B: 16 bytes of the
// larger type, so that neighbouring lanes access neighbouring bytes of both.
template <typename A, typename B>
constexpr int kStep = kPer16Bytes<A> < kPer16Bytes<B> ? kPer16Bytes<A> : kPer16Bytes<B>;

// Loads one thread's share of row[0, n): vectors of N neighbouring elements, one every `threads`
// vectors, and zeros from n on. All loads are issued before any value is used, since latency limits
// these kernels. N divides n, and for N > 1 the row is 16-byte aligned.
template <int N, int count, typename T>
__device__ __forceinline__ void load_share(const T* row, int n, int thread, int threads,
                                           Vector<T, N> (&share)[count]) {
#pragma unroll
  for (int v = 0; v < count; ++v) {
    const int i = (v * threads + thread) * N;
    share[v] = i < n ? load<N>(row + i) : Vector<T, N>{};
  }
}

template <int N, int count, typename T>
__device__ __forceinline__ void store_share(T* row, int n, int thread, int threads,
                                            const Vector<T, N> (&share)[count]) {
#pragma unroll
  for (int v = 0; v < count; ++v) {
    const int i = (v * threads + thread) * N;
    if (i < n) store(row + i, share[v]);
  }
}

// to = from * scale, rounded once.
template <int N, int count, typename From, typename To>
__device__ __forceinline__ void scale_share(const Vector<From, N> (&from)[count], Wide<From> scale,
                                            Vector<To, N> (&to)[count]) {
#pragma unroll
  for (int v = 0; v < count; ++v) {
#pragma unroll
    for (int e = 0; e < N; ++e) to[v].at[e] = narrow<To>(widen(from[v].at[e]) * scale);
  }
}

// Returns the sum over each group of `lanes` neighbouring lanes, with equal bits in every lane.
template <int lanes, typename T>
__device__ __forceinline__ T sum_over_lanes(T value) {
  static_assert(lanes > 0 && (lanes & (lanes - 1)) == 0 && lanes <= kWarp, "within a warp");
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += shuffle_xor(value, distance);
  }
  return value;
}

}  // namespace rasa_ext
