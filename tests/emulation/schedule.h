// What both ways of running threads share.
#pragma once

#include <random>
#include <vector>

#include "emulation.h"

namespace emulation {

constexpr int kLanes = 32;

// Draws from the seed that set_schedule gave.
std::mt19937_64& random_source();

Counts& mutable_counts();

// Every place of a grid, in a random order.
std::vector<dim3> shuffled_blocks(dim3 grid);

// Throws std::logic_error if no launch can have this shape.
void check_launch(dim3 grid, dim3 block, size_t shared_bytes);

// Shared memory of exactly that size, all NaN; null for none.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  void* data() const { return data_; }
  void poison();

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

}  // namespace emulation
