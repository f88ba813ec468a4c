// What a block or a warp does together: reading and writing a row, adding up.
#pragma once

#include "numbers.cuh"

namespace rasa_ext {

constexpr int kWarp = 32;

// How many elements a thread takes at a time where rows of A go to rows of B: 16 bytes of the
// larger type, so that neighbouring lanes have neighbouring bytes of both.
template <typename A, typename B>
constexpr int kStep = kPer16Bytes<A> < kPer16Bytes<B> ? kPer16Bytes<A> : kPer16Bytes<B>;

// One thread's share of row[0, n): vectors of N neighbours, `threads` vectors apart, and zeros from
// n on. All are asked for before any is used: it is latency that these kernels wait for. N divides
// n, and with N > 1 the row begins at 16 bytes.
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

// The sum over groups of `lanes` neighbouring lanes, the same bits in every lane.
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
