// Shared parts of both ways of running threads: fibers.cpp and threads.cpp.
#pragma once

#include <deque>
#include <random>
#include <vector>

#include "emulation.h"

namespace emulation {

// The random generator, seeded by set_schedule.
std::mt19937_64& random_source();

Counts& mutable_counts();

// Every place of a grid, in a random order.
std::vector<dim3> shuffled_blocks(dim3 grid);

// Throws std::logic_error if a launch cannot have this shape.
void check_launch(dim3 grid, dim3 block, size_t shared_bytes, size_t most_shared);

// A thread's asynchronous copies that are not done yet.
struct Copies {
  struct Copy {
    void* to;
    const void* from;  // null for zeros
    size_t bytes;
    int64_t group;
  };
  std::deque<Copy> waiting;
  int64_t group = 0;   // the group of the next copy
  uint32_t draws = 0;  // random state, which decides whether a copy is done at once
};

// The copies of the running thread.
Copies& copies();

// Shared memory of exactly `bytes` bytes; null if 0. `poison` fills it with NaN.
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
