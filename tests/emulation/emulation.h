// CUDA's words on a host, so that a C++ compiler takes kernels as they are.
//
// The threads of a block are fibers or, under ThreadSanitizer, threads of the system; they change
// at barriers and shuffles. Blocks and threads run in an order drawn from a seed. Shared memory is
// filled with NaN before each block. What is undefined in CUDA and can be seen here throws
// std::logic_error from the launch: threads that wait at different barriers, or leave while others
// wait; shuffles without all 32 lanes; accesses to vectors at crooked addresses.
//
// Speed, bank conflicts and the memory model of a GPU cannot be seen.
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

// The order of everything launched from now on.
void set_schedule(uint64_t seed);

// Runs `kernel` once for every thread of every block. One-dimensional blocks of whole warps.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What launches did since the program began.
struct Counts {
  int64_t launches, blocks, barriers, shuffles;  // barriers: one a block, shuffles: one a warp
};
Counts counts();

// ---- Within a kernel ----

struct Place {
  dim3 thread, block, block_dim, grid_dim;
  void* shared = nullptr;
};

// The place of the thread that is running.
const Place& place();

// The launch's shared memory, exactly as large as asked for.
inline void* shared_memory() { return place().shared; }

void barrier(const char* file, int line);

// The 64 bits that the lane whose number differs in `lanes` has brought.
uint64_t exchange(uint64_t bits, int lanes);

void check_alignment(const void* pointer, size_t size);

template <typename T>
T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one register, or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, lanes);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

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
