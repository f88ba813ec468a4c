// CUDA's language on a host, so that a C++ compiler accepts unchanged kernels.
//
// The threads of a block are fibers or, under ThreadSanitizer, threads of the system. They switch
// at barriers and at operations of a whole warp. Blocks and threads run in an order drawn from a
// seed. Shared memory is filled with NaN before each block. An asynchronous copy is done at once or
// only when waited for, chosen at random. Undefined behaviour of CUDA that can be detected here
// throws std::logic_error from the launch: threads that wait at different barriers, or exit while
// others wait; shuffles and products without all 32 lanes; misaligned vector accesses.
//
// Speed, bank conflicts and the memory model of a GPU are not emulated.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "half_types.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

// Sets the seed for the order of everything launched from now on.
void set_schedule(uint64_t seed);

// Shared memory that a block may use without a request, and at most (sm_120 has the least).
constexpr size_t kSharedBytes = 48 * 1024, kMostSharedBytes = 99 * 1024;

// Runs `kernel` once for every thread of every block. Blocks must be one-dimensional, of whole
// warps.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
            size_t most_shared = kSharedBytes);

// Launches and blocks since the program started.
struct Counts {
  int64_t launches, blocks;
};
Counts counts();

// ---- Within a kernel ----

struct Place {
  dim3 thread, block, block_dim, grid_dim;
  void* shared = nullptr;
};

// The place of the running thread.
const Place& place();

// The launch's shared memory, exactly as large as requested.
inline void* shared_memory() { return place().shared; }

void barrier(const char* file, int line);

constexpr int kLanes = 32;

// The values that a lane contributes to an operation of the whole warp.
struct Brought {
  uint64_t bits[3];
};

// Exchanges values among the lanes of the warp; the result is valid until the warp's next exchange.
// All lanes must do the same operation, with equal `what`.
const Brought* meet_warp(const Brought& brought, int what);

void check_alignment(const void* pointer, size_t size);

template <typename T>
T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one register, or two");
  Brought mine{};
  std::memcpy(&mine, &value, sizeof(T));
  const Brought* all = meet_warp(mine, lanes);
  std::memcpy(&value, &all[(place().thread.x ^ lanes) % kLanes], sizeof(T));
  return value;
}

// ---- Instructions of the tensor cores, by the PTX manual ----

// ldmatrix.x4: lane i passes row i % 8 of matrix i / 8; `transposed` is .trans.
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed);

// mma.m16n8k16 (row, col): sum += A B; `widen` converts the bits of a half type. A GPU's order of
// summation is unknown; here products are exact and summed in double.
void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       float (*widen)(uint16_t));

// cp.async of 4 or 16 bytes, or zeros if `wanted` is false; commit_group; wait_group.
void copy_async(void* to, const void* from, size_t bytes, bool wanted);
void commit_copies();
void wait_copies(int groups_in_flight);

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define threadIdx (emulation::place().thread)
#define blockIdx (emulation::place().block)
#define blockDim (emulation::place().block_dim)
#define gridDim (emulation::place().grid_dim)

using std::max;
using std::min;
