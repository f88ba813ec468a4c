// What both ways of running threads share.
#pragma once

#include <deque>
#include <random>
#include <vector>

#include "emulation.h"

namespace emulation {

// Draws from the seed that set_schedule gave.
std::mt19937_64& random_source();

Counts& mutable_counts();

// Every place of a grid, in a random order.
std::vector<dim3> shuffled_blocks(dim3 grid);

// Throws std::logic_error if no launch can have this shape.
void check_launch(dim3 grid, dim3 block, size_t shared_bytes, size_t most_shared);

// The copies that a thread has asked for and that have not landed.
struct Copies {
  struct Copy {
    void* to;
    const void* from;  // null for zeros
    size_t bytes;
    int64_t group;
  };
  std::deque<Copy> waiting;
  int64_t group = 0;   // that the next copy belongs to
  uint32_t draws = 0;  // of whether a copy lands at once
};

// Of the thread that is running.
Copies& copies();

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
