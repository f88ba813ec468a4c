// What a block or a warp does together: walking a matrix, copying, adding up.
#pragma once

#include "numbers.cuh"

namespace rasa_ext {

constexpr int kWarp = 32;

// The places (row, col) of one thread when a block walks a matrix of `width` > 0 columns row by
// row. Divides once; a step is two additions.
struct Walk {
  int row, col;
  int row_step, col_step, width;

  __device__ __forceinline__ explicit Walk(int width_) : width(width_) {
    const unsigned thread = threadIdx.x, threads = blockDim.x, columns = width_;
    row = thread / columns;
    col = thread % columns;
    row_step = threads / columns;
    col_step = threads % columns;
  }

  __device__ __forceinline__ void next() {
    row += row_step;
    col += col_step;
    if (col >= width) {
      col -= width;
      ++row;
    }
  }
};

// to[i] = from[i] for i < n, by the block.
template <typename From, typename To>
__device__ __forceinline__ void copy_cast(const From* from, To* to, int n) {
  // As many as fill 16 bytes of the smaller type; the larger one takes two or more accesses.
  constexpr int N = kPer16Bytes<From> > kPer16Bytes<To> ? kPer16Bytes<From> : kPer16Bytes<To>;
  int done = 0;
  if (is_aligned(from) && is_aligned(to)) {
    done = n / N * N;
    for (int i = threadIdx.x * N; i < done; i += blockDim.x * N) {
      const Vector<From, N> source = load<N>(from + i);
      Vector<To, N> cast;
#pragma unroll
      for (int v = 0; v < N; ++v) cast.at[v] = narrow<To>(widen(source.at[v]));
      store(to + i, cast);
    }
  }
  for (int i = done + threadIdx.x; i < n; i += blockDim.x) to[i] = narrow<To>(widen(from[i]));
}

// to[i] = 0 for i < n, by the block.
template <typename To>
__device__ __forceinline__ void fill_zero(To* to, int n) {
  constexpr int N = kPer16Bytes<To>;
  int done = 0;
  if (is_aligned(to)) {
    Vector<To, N> zeros;
#pragma unroll
    for (int v = 0; v < N; ++v) zeros.at[v] = narrow<To>(0);
    done = n / N * N;
    for (int i = threadIdx.x * N; i < done; i += blockDim.x * N) store(to + i, zeros);
  }
  for (int i = done + threadIdx.x; i < n; i += blockDim.x) to[i] = narrow<To>(0);
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
