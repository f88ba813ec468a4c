// The primitives that kernels use: CUDA's, or those of an emulation on a host without CUDA. No
// other file differs between the two.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RASA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// Like RASA_LAUNCH, with more shared memory than a launch may use by default.
#define RASA_LAUNCH_LARGE(kernel, grid, block, shared_bytes, stream, ...)                   \
  (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), \
   kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__))

// Declares the launch's shared memory as an array of `type`.
#define RASA_SHARED(type, name)                                      \
  extern __shared__ __align__(16) unsigned char rasa_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(rasa_shared_bytes)

namespace rasa_ext {

using float16 = __half;
using bfloat16 = __nv_bfloat16;

// Tells the compiler that a pointer from a table points to global memory. Otherwise the compiler
// must assume that stores to shared memory change what it points to, and delays loads. A null
// pointer stays null.
template <typename T, typename From>
__device__ __forceinline__ T* global(From* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return static_cast<T*>(pointer);
}

// Returns the value of the lane whose number differs in the bits of `lanes`. All 32 lanes take
// part.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Loads a V in as few accesses as its size allows. The address is a multiple of min(sizeof(V), 16).
template <typename V>
__device__ __forceinline__ V load_aligned(const void* from) {
  return *static_cast<const V*>(from);
}

// Stores to global memory. Stores of several words are written in PTX: nvcc 13.0 splits an
// assignment, even of a uint4, into single words if it loses track of the alignment.
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

// Stores to shared memory.
template <typename V>
__device__ __forceinline__ void put_aligned(void* to, const V& value) {
  *static_cast<V*>(to) = value;
}

// ---- Tensor cores, from sm_80 on ----

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Loads four 8 x 8 matrices of 16-bit numbers. Lane i passes the 16-byte aligned address of row i %
// 8 of matrix i / 8. Lane l gets elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of each
// matrix; with load_transposed, of column l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// sum (16, 8) += A (16, 16) B (16, 8). With g = lane / 4 and t = lane % 4, sum has rows g and g + 8
// at columns 2t and 2t + 1; `a` has A's rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8
// and each next column; b0 and b1 have B's column g at rows 2t, 2t + 8 and each next row.
template <typename T>
__device__ __forceinline__ void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Copies 4 or 16 bytes from global to shared memory, or writes zeros if not `wanted`. This thread
// may read them after wait_copies, other threads after a barrier as well.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool wanted) {
  static_assert(bytes == 4 || bytes == 16, "what cp.async has");
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(wanted ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(wanted ? 4 : 0)
                 : "memory");
  }
}

// Closes the current group of copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all groups but the last `groups` are complete.
template <int groups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
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

#define RASA_LAUNCH_LARGE(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                             \
   emulation::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }, shared_bytes))

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

template <typename V>
void put_aligned(void* to, const V& value) {
  store_aligned(to, value);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::load_matrices(to, row, false);
}
inline void load_transposed(uint32_t (&to)[4], const void* row) {
  emulation::load_matrices(to, row, true);
}

template <typename T>
void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_matrices(sum, a, b0, b1, [](uint16_t bits) { return as_float(T{bits}); });
}

template <int bytes>
void copy_async(void* to, const void* from, bool wanted) {
  emulation::copy_async(to, from, bytes, wanted);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int groups>
void wait_copies() {
  emulation::wait_copies(groups);
}

}  // namespace rasa_ext

#endif
