// Whether the emulation sees what it is there to see: each of these kernels is wrong in one way.
#include <cstring>
#include <stdexcept>

#include "arrays.h"
#include "checks.h"
#include "emulation.h"

namespace check {
namespace {

constexpr unsigned kThreads = 64;

// Fails unless the kernel is stopped with a message that holds `words`.
void expect_stopped(const std::string& words, const std::function<void()>& kernel) {
  begin_case(words);
  try {
    emulation::launch(dim3(2), dim3(kThreads), kThreads * sizeof(int), kernel);
  } catch (const std::logic_error& error) {
    if (std::strstr(error.what(), words.c_str()) == nullptr) {
      fail(std::string("stopped with another reason: ") + error.what());
    }
    return;
  }
  fail("not stopped");
}

// The neighbour's number through shared memory, with a barrier or without.
std::vector<int> neighbours(bool with_barrier, uint64_t seed) {
  std::vector<int> result(kThreads);
  emulation::set_schedule(seed);
  emulation::launch(dim3(1), dim3(kThreads), kThreads * sizeof(int), [&] {
    int* shared = static_cast<int*>(emulation::shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    shared[thread] = thread;
    if (with_barrier) __syncthreads();
    result[thread] = shared[(thread + 1) % kThreads];
  });
  return result;
}

}  // namespace

void check_machine() {
  begin_case("a barrier makes the neighbour's value visible");
  for (int i = 0; i < 20; ++i) {
    const std::vector<int> right = neighbours(true, i);
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      if (right[thread] != static_cast<int>((thread + 1) % kThreads)) fail("it does not");
    }
  }
#if !defined(__SANITIZE_THREAD__)
  begin_case("without the barrier it is not");
  if (neighbours(false, 1) == neighbours(true, 1)) fail("but it is");
  begin_case("schedules differ");
  if (neighbours(false, 1) == neighbours(false, 2)) fail("they do not");
  begin_case("a schedule can be repeated");
  if (neighbours(false, 3) != neighbours(false, 3)) fail("it cannot");
#endif
  begin_case("shuffles exchange within a warp");
  std::vector<int> swapped(kThreads);
  emulation::launch(dim3(1), dim3(kThreads), 0, [&] {
    const int thread = static_cast<int>(threadIdx.x);
    swapped[thread] = emulation::shuffle_xor(emulation::shuffle_xor(thread, 5), 16);
  });
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    if (swapped[thread] != static_cast<int>(thread ^ 5 ^ 16)) fail("wrong lane");
  }
  expect_stopped("left the kernel", [] {
    if (threadIdx.x == 3) return;
    __syncthreads();
  });
  expect_stopped("barrier", [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
#if !defined(__SANITIZE_THREAD__)
  // Threads of the system would wait for ever, as on a GPU.
  expect_stopped("shuffle", [] {
    if (threadIdx.x != 3) emulation::shuffle_xor(1, 1);
  });
#endif
  expect_stopped("crooked", [] {
    emulation::check_alignment(static_cast<char*>(emulation::shared_memory()) + 4, 16);
  });
  begin_case("launches that no GPU takes");
  for (const dim3 block : {dim3(33), dim3(2048), dim3(0)}) {
    try {
      emulation::launch(dim3(1), block, 0, [] {});
    } catch (const std::logic_error&) {
      continue;
    }
    fail("taken");
  }
}

}  // namespace check
