// dropout: a mask drawn from a counter, so that it can be drawn again instead of being kept.
//
//     x_drop = mask * x / (1 - p)        dx += mask * dx_drop / (1 - p)
//
// A dropped element is 0 whatever it was.
#pragma once

#include "heuristics.cuh"
#include "philox.cuh"

namespace rasa_ext {

template <typename W>
struct DropoutParams {
  const uint64_t* seed_offset;  // (2,)
  int64_t n;
  uint32_t threshold;  // a word below it drops
  W scale;             // 1 / (1 - p)
};

// Bit v of the result says whether element 8 * byte + v is kept; 0 from element n on.
template <typename W>
__device__ __forceinline__ unsigned draw_byte(const DropoutParams<W>& params, int64_t byte) {
  const uint64_t key = params.seed_offset[0];
  const uint64_t counter = params.seed_offset[1] + 2 * static_cast<uint64_t>(byte);
  const Words low = philox(key, counter), high = philox(key, counter + 1);
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    bits |= static_cast<unsigned>(low.at[v] >= params.threshold) << v;
    bits |= static_cast<unsigned>(high.at[v] >= params.threshold) << (4 + v);
  }
  const int64_t left = params.n - byte * kDropoutElements;
  return left < kDropoutElements ? bits & ((1u << left) - 1) : bits;
}

// Calls body(i, v) for the elements i = 8 * byte + v of one byte, v < 8, and leaves out those from
// n on.
template <typename T>
__device__ __forceinline__ Vector<T, kDropoutElements> load_some(const T* from, int n) {
  constexpr int N = kDropoutElements;
  if (n == N && is_aligned(from)) return load<N>(from);
  Vector<T, N> value;
#pragma unroll
  for (int v = 0; v < N; ++v) value.at[v] = v < n ? from[v] : narrow<T>(0);
  return value;
}

template <typename T>
__device__ __forceinline__ void store_some(T* to, int n, const Vector<T, kDropoutElements>& value) {
  constexpr int N = kDropoutElements;
  if (n == N && is_aligned(to)) return store(to, value);
#pragma unroll
  for (int v = 0; v < N; ++v) {
    if (v < n) to[v] = value.at[v];
  }
}

// x_drop = mask * x / (1 - p); eight elements and a byte of the mask to a thread.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    dropout_kernel(const T* x,     // (n,)
                   T* x_drop,      // (n,)
                   uint8_t* mask,  // ((n + 7) / 8,) or null
                   DropoutParams<Wide<T>> params) {
  const int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = byte * kDropoutElements;
  if (first >= params.n) return;
  const int n = static_cast<int>(min(params.n - first, static_cast<int64_t>(kDropoutElements)));
  const unsigned kept = draw_byte(params, byte);
  if (mask != nullptr) mask[byte] = static_cast<uint8_t>(kept);
  Vector<T, kDropoutElements> value = load_some(x + first, n);
#pragma unroll
  for (int v = 0; v < kDropoutElements; ++v) {
    value.at[v] = narrow<T>(kept >> v & 1 ? widen(value.at[v]) * params.scale : Wide<T>(0));
  }
  store_some(x_drop + first, n, value);
}

// dx += mask * dx_drop / (1 - p).
template <typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    dropout_backward_kernel(const T* dx_drop,     // (n,)
                            T* dx,                // (n,)
                            const uint8_t* mask,  // ((n + 7) / 8,); null: drawn again
                            DropoutParams<Wide<T>> params) {
  const int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = byte * kDropoutElements;
  if (first >= params.n) return;
  const int n = static_cast<int>(min(params.n - first, static_cast<int64_t>(kDropoutElements)));
  const unsigned kept = mask != nullptr ? mask[byte] : draw_byte(params, byte);
  const Vector<T, kDropoutElements> grad = load_some(dx_drop + first, n);
  Vector<T, kDropoutElements> value = load_some(dx + first, n);
#pragma unroll
  for (int v = 0; v < kDropoutElements; ++v) {
    const Wide<T> added = kept >> v & 1 ? widen(grad.at[v]) * params.scale : Wide<T>(0);
    value.at[v] = narrow<T>(widen(value.at[v]) + added);
  }
  store_some(dx + first, n, value);
}

}  // namespace rasa_ext
