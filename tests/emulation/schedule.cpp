#include "schedule.h"

#include <cstdlib>
#include <string>

namespace emulation {

std::mt19937_64& random_source() {
  static std::mt19937_64 source;
  return source;
}

void set_schedule(uint64_t seed) { random_source().seed(seed); }

Counts& mutable_counts() {
  static Counts counts{};
  return counts;
}

Counts counts() { return mutable_counts(); }

std::vector<dim3> shuffled_blocks(dim3 grid) {
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), random_source());
  return blocks;
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto refuse = [](const char* name, const char* expected, uint64_t actual) {
    throw std::logic_error(std::string(name) + ": expected " + expected + ", got " +
                           std::to_string(actual));
  };
  if (grid.x == 0 || grid.x > 0x7fffffffu) refuse("grid.x", "1 to 2^31 - 1", grid.x);
  if (grid.y == 0 || grid.y > 65535) refuse("grid.y", "1 to 65535", grid.y);
  if (grid.z == 0 || grid.z > 65535) refuse("grid.z", "1 to 65535", grid.z);
  if (block.x == 0 || block.x > 1024 || block.x % kLanes != 0) {
    refuse("block.x", "whole warps up to 1024 threads", block.x);
  }
  if (block.y != 1 || block.z != 1) refuse("block.y * block.z", "1", block.y * block.z);
  if (shared_bytes > 48 * 1024) refuse("shared memory", "at most 49152 bytes", shared_bytes);
}

void check_alignment(const void* pointer, size_t size) {
  const size_t needed = std::min<size_t>(size, 16);
  if (reinterpret_cast<uintptr_t>(pointer) % needed != 0) {
    throw std::logic_error("a vector of " + std::to_string(size) +
                           " bytes is read or written at a crooked address");
  }
}

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes) {
  if (bytes > 0) data_ = std::malloc(bytes);
}

SharedMemory::~SharedMemory() { std::free(data_); }

void SharedMemory::poison() {
  if (bytes_ > 0) std::memset(data_, 0xff, bytes_);
}

}  // namespace emulation
