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

void check_launch(dim3 grid, dim3 block, size_t shared_bytes, size_t most_shared) {
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
  if (shared_bytes > std::min(most_shared, kMostSharedBytes)) {
    refuse("shared memory", "no more than was asked for or there is", shared_bytes);
  }
}

void check_alignment(const void* pointer, size_t size) {
  const size_t needed = std::min<size_t>(size, 16);
  if (reinterpret_cast<uintptr_t>(pointer) % needed != 0) {
    throw std::logic_error("a vector of " + std::to_string(size) +
                           " bytes is read or written at a crooked address");
  }
}

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  check_alignment(row, 16);
  Brought mine{};
  mine.bits[0] = reinterpret_cast<uintptr_t>(row);
  const Brought* all = meet_warp(mine, transposed ? kLanes + 1 : kLanes);
  const unsigned lane = place().thread.x % kLanes, row_of = lane / 4, pair = lane % 4 * 2;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t two[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = transposed ? pair + i : row_of, c = transposed ? row_of : pair + i;
      const auto* from = reinterpret_cast<const char*>(all[matrix * 8 + r].bits[0]);
      std::memcpy(&two[i], from + c * sizeof(uint16_t), sizeof(uint16_t));
    }
    to[matrix] = two[0] | uint32_t{two[1]} << 16;
  }
}

void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       float (*widen)(uint16_t)) {
  const Brought mine{
      {a[0] | uint64_t{a[1]} << 32, a[2] | uint64_t{a[3]} << 32, b0 | uint64_t{b1} << 32}};
  const Brought* all = meet_warp(mine, kLanes + 2);
  const unsigned lane = place().thread.x % kLanes, group = lane / 4, pair = lane % 4 * 2;
  // This lane's two rows of A and two columns of B.
  double rows[2][16], columns[2][16];
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned in_pair = k % 8 / 2, high = k / 8, odd = k % 2;
    for (unsigned i = 0; i < 2; ++i) {
      const uint64_t A = all[group * 4 + in_pair].bits[high];
      const uint64_t B = all[(pair + i) * 4 + in_pair].bits[2];
      rows[i][k] = widen(static_cast<uint16_t>(A >> 16 * (2 * i + odd)));
      columns[i][k] = widen(static_cast<uint16_t>(B >> 16 * (2 * high + odd)));
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    double total = sum[i];
    for (unsigned k = 0; k < 16; ++k) total += rows[i / 2][k] * columns[i % 2][k];
    sum[i] = static_cast<float>(total);
  }
}

namespace {

void land(const Copies::Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

}  // namespace

void copy_async(void* to, const void* from, size_t bytes, bool wanted) {
  check_alignment(to, bytes);
  check_alignment(from, bytes);
  Copies& mine = copies();
  const Copies::Copy copy{to, wanted ? from : nullptr, bytes, mine.group};
  // Each thread has its own random state, so that a schedule's draws can be repeated.
  mine.draws = mine.draws * 1664525u + 1013904223u + place().thread.x;
  if (mine.draws >> 31 != 0) return land(copy);
  mine.waiting.push_back(copy);
}

void commit_copies() { ++copies().group; }

void wait_copies(int groups_in_flight) {
  Copies& mine = copies();
  while (!mine.waiting.empty() && mine.waiting.front().group < mine.group - groups_in_flight) {
    land(mine.waiting.front());
    mine.waiting.pop_front();
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
