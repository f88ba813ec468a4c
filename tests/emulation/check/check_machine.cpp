// Checks the emulation itself: correct operations give right results, wrong kernels are detected.
#include <cstring>
#include <random>
#include <stdexcept>

#include "arrays.h"
#include "checks.h"
#include "cuda/platform.cuh"

namespace check {
namespace {

constexpr unsigned kThreads = 64;

// Fails unless the kernel is stopped with a message that contains `words`.
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

// Each thread reads its neighbour's number from shared memory, with or without a barrier.
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

// ---- Instructions of the tensor cores ----

// Rows and columns of a lane's elements follow the PTX manual, "Matrix fragments for mma.m16n8k16
// with floating point type".
void check_products(std::mt19937& source) {
  begin_case("mma.m16n8k16");
  std::uniform_int_distribution<int> small(-8, 8);
  float A[16][16], B[16][8], C[16][8], found[16][8];
  for (auto& row : A)
    for (float& each : row) each = static_cast<float>(small(source));
  for (auto& row : B)
    for (float& each : row) each = static_cast<float>(small(source)) / 4;
  for (auto& row : C)
    for (float& each : row) each = static_cast<float>(small(source)) / 16;
  emulation::launch(dim3(1), dim3(32), 0, [&] {
    const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, in_group = lane % 4;
    uint32_t a[4] = {}, b[2] = {};
    float sum[4];
    for (int i = 0; i < 8; ++i) {
      const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[i / 2] |= uint32_t{emulation::as_bfloat16(A[row][col]).bits} << 16 * (i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[i / 2] |= uint32_t{emulation::as_bfloat16(B[row][group]).bits} << 16 * (i % 2);
    }
    const auto place = [&](int i, float (&of)[16][8]) -> float& {
      return of[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    };
    for (int i = 0; i < 4; ++i) sum[i] = place(i, C);
    rasa_ext::multiply_matrices<emulation::bfloat16>(sum, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) place(i, found) = sum[i];
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double expected = C[i][j];
      for (int k = 0; k < 16; ++k) expected += double{A[i][k]} * B[k][j];
      if (found[i][j] != expected) fail("an element differs");
    }
  }
}

// By the manual's figure of ldmatrix, thread T gets elements 2 * (T % 4) and the next one of row
// T / 4.
void check_loads() {
  begin_case("ldmatrix");
  alignas(16) uint16_t matrices[4][8][8];
  for (int i = 0; i < 256; ++i) matrices[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
  bool same = true;
  emulation::launch(dim3(1), dim3(32), 0, [&] {
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t plain[4], transposed[4];
    rasa_ext::load_matrices(plain, matrices[lane / 8][lane % 8]);
    rasa_ext::load_transposed(transposed, matrices[lane / 8][lane % 8]);
    if (lane != 0 && lane != 13 && lane != 31) return;
    for (int i = 0; i < 4; ++i) {
      const auto& of = matrices[i];
      const int row = lane / 4, col = lane % 4 * 2;
      same = same && plain[i] == (of[row][col] | uint32_t{of[row][col + 1]} << 16) &&
             transposed[i] == (of[col][row] | uint32_t{of[col + 1][row]} << 16);
    }
  });
  if (!same) fail("an element differs");
}

// Counts the copied elements that 32 threads see while `groups` groups may still be in flight.
template <int groups>
int copies_seen(uint64_t seed) {
  alignas(16) uint32_t from[2][32 * 4];
  for (uint32_t& each : from[0]) each = 7;
  for (uint32_t& each : from[1]) each = 9;
  int seen = 0;
  emulation::set_schedule(seed);
  emulation::launch(dim3(1), dim3(32), sizeof from + 32 * sizeof(uint32_t), [&] {
    auto* to = static_cast<uint32_t*>(emulation::shared_memory());
    const unsigned lane = threadIdx.x;
    for (unsigned group = 0; group < 2; ++group) {
      rasa_ext::copy_async<16>(to + (group * 32 + lane) * 4, from[group] + lane * 4, lane != 3);
      if (group == 1) rasa_ext::copy_async<4>(to + 256 + lane, from[1], true);
      rasa_ext::commit_copies();
    }
    rasa_ext::wait_copies<groups>();
    const bool zero = lane == 3;
    for (unsigned i = 0; i < 4; ++i) {
      seen += to[lane * 4 + i] == (zero ? 0u : 7u);
      seen += to[(32 + lane) * 4 + i] == (zero ? 0u : 9u);
    }
    seen += to[256 + lane] == 9u;
  });
  return seen;
}

void check_copies() {
  constexpr int kFirst = 32 * 4, kAll = 2 * kFirst + 32;
  begin_case("copies are there once they are waited for");
  for (uint64_t seed = 0; seed < 20; ++seed) {
    if (copies_seen<0>(seed) != kAll) fail("they are not");
    if (copies_seen<1>(seed) < kFirst) fail("the group before the last is not");
  }
  begin_case("without that, some");
  bool some_late = false, some_early = false;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    some_late = some_late || copies_seen<1>(seed) < kAll;
    some_early = some_early || copies_seen<2>(seed) > 0;
  }
  if (!some_late) fail("all were there");
  if (!some_early) fail("none was there");
}

}  // namespace

void check_machine() {
  std::mt19937 source(5);
#if !defined(__SANITIZE_THREAD__)
  check_products(source);
  check_loads();
  check_copies();
#endif
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
  // Threads of the system would wait forever, as on a GPU.
  expect_stopped("a warp waits", [] {
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
