// Element types: accumulation types, casts, and 16-byte vectors.
#pragma once

#include "platform.cuh"

namespace rasa_ext {

// The type in which values of type T are computed.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float16 value) { return as_float(value); }
__device__ __forceinline__ float widen(bfloat16 value) { return as_float(value); }

template <typename T>
struct Narrow {
  static_assert(sizeof(T) >= 4, "half types are specialised");
  static __device__ __forceinline__ T from(Wide<T> value) { return value; }
};
template <>
struct Narrow<float16> {
  static __device__ __forceinline__ float16 from(float value) { return as_float16(value); }
};
template <>
struct Narrow<bfloat16> {
  static __device__ __forceinline__ bfloat16 from(float value) { return as_bfloat16(value); }
};

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Wide<T> value) {
  return Narrow<T>::from(value);
}

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  static_assert((N & (N - 1)) == 0, "vectors are powers of two, or accesses would not be whole");
  T at[N];
};

// Number of T in 16 bytes.
template <typename T>
constexpr int kPer16Bytes = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Loads N neighbouring elements, aligned to 16 bytes or, if smaller, to their size together.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return load_aligned<Vector<T, N>>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& value) {
  store_aligned(to, value);
}

}  // namespace rasa_ext
