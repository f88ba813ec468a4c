// What kernels are written in: CUDA, or on a host without it the words of an emulation. Everything
// that is spelled differently there stands in this file.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RASA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// The launch's shared memory as an array of `type`.
#define RASA_SHARED(type, name)                                      \
  extern __shared__ __align__(16) unsigned char rasa_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(rasa_shared_bytes)

namespace rasa_ext {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

// A pointer that came from a table, said to be one into global memory: the compiler would otherwise
// have to think that stores to shared memory change what it points to, and hold loads back. Null
// pointers are passed on.
template <typename T, typename From>
__device__ __forceinline__ T* global(From* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return static_cast<T*>(pointer);
}

// The value of the lane whose number differs in the bits of `lanes`; all 32 take part.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// As few accesses as the size of V takes; the address is a multiple of min(sizeof(V), 16).
template <typename V>
__device__ __forceinline__ V load_aligned(const void* from) {
  return *static_cast<const V*>(from);
}

// Stores to global memory. Those of several words are said in PTX: of an assignment, even of a
// uint4, nvcc 13.0 makes stores of single words where it loses sight of the alignment.
__device__ __forceinline__ void store_bits(void* to, uint4 bits) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}
__device__ __forceinline__ void store_bits(void* to, uint2 bits) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
               "r"(bits.y)
               : "memory");
}
__device__ __forceinline__ void store_bits(void* to, uint32_t bits) {
  *static_cast<uint32_t*>(to) = bits;
}
__device__ __forceinline__ void store_bits(void* to, uint16_t bits) {
  *static_cast<uint16_t*>(to) = bits;
}

template <size_t bytes>
using BitsOf = std::conditional_t<
    bytes == 2, uint16_t,
    std::conditional_t<bytes == 4, uint32_t, std::conditional_t<bytes == 8, uint2, uint4>>>;

template <typename V>
__device__ __forceinline__ void store_aligned(void* to, const V& value) {
  using Bits = BitsOf<sizeof(V)>;
  static_assert(sizeof(V) % sizeof(Bits) == 0, "whole accesses");
  Bits bits[sizeof(V) / sizeof(Bits)];
  memcpy(bits, &value, sizeof(V));
#pragma unroll
  for (size_t i = 0; i < sizeof(V) / sizeof(Bits); ++i) {
    store_bits(static_cast<Bits*>(to) + i, bits[i]);
  }
}

__device__ __forceinline__ float as_float(float16 value) { return __half2float(value); }
__device__ __forceinline__ float as_float(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float16 as_float16(float value) { return __float2half_rn(value); }
__device__ __forceinline__ bfloat16 as_bfloat16(float value) { return __float2bfloat16_rn(value); }

}  // namespace rasa_ext

#else

#include <cstring>

#include "emulation.h"

#define RASA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                       \
   emulation::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))

#define RASA_SHARED(type, name) type* const name = static_cast<type*>(emulation::shared_memory())

namespace rasa_ext {

using emulation::as_bfloat16;
using emulation::as_float;
using emulation::as_float16;
using emulation::bfloat16;
using emulation::float16;

template <typename T, typename From>
T* global(From* pointer) {
  return static_cast<T*>(pointer);
}

template <typename T>
T shuffle_xor(T value, int lanes) {
  return emulation::shuffle_xor(value, lanes);
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

template <typename V>
V load_aligned(const void* from) {
  emulation::check_alignment(from, sizeof(V));
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
void store_aligned(void* to, const V& value) {
  emulation::check_alignment(to, sizeof(V));
  std::memcpy(to, &value, sizeof(V));
}

}  // namespace rasa_ext

#endif
