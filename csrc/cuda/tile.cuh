// A tile of B (out, ranks) or of its gradient: ranks are columns in global memory, and rows in
// shared memory. So warps read and write neighbouring bytes of B and of a pack.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"

namespace rasa_ext {

// The first of some neighbouring ranks, all private or all of the pool and the padding.
struct Ranks {
  bool own;
  int first, column;  // the rank, and its column of B or of B_pool
};

// Returns how many groups of `most` ranks cover `own` private ranks and `others`.
__host__ __device__ __forceinline__ constexpr int groups_of(int own, int others, int most) {
  return (own + most - 1) / most + (others + most - 1) / most;
}

__device__ __forceinline__ Ranks ranks_of(int group, int own, int most) {
  const int other = group - groups_of(own, 0, most);
  const int column = (other < 0 ? group : other) * most;
  return {other < 0, other < 0 ? column : own + column, column};
}

// `most` ranks of `width` outputs. A thread loads and saves the same elements, so that a tile may
// be loaded again after it was saved, without a barrier.
template <typename P, int most, int width>
struct Tile {
  // Lanes take `most` neighbouring ranks of one output, then of the next. At this distance between
  // rows, they use different banks of shared memory. Rows are 16-byte aligned.
  static constexpr int kPitch = width + 128 / most / static_cast<int>(sizeof(P));
  static constexpr int kBytes = most * kPitch * static_cast<int>(sizeof(P));
  static constexpr int kOutputs = kStreamThreads / most, kCount = width / kOutputs;
  static_assert(kCount * kOutputs == width && kPitch * sizeof(P) % 16 == 0, "whole shares");

  P* rows;  // (most, kPitch)

  __device__ __forceinline__ P* row(int j) const { return rows + j * kPitch; }

  // Loads outputs [begin, out) of B (out, ranks), from column `first` on; zeros beyond its end.
  __device__ __forceinline__ void load(const P* B, int out, int ranks, int begin, int first) const {
    const int j = threadIdx.x % most, o = threadIdx.x / most;
    const int left = first + j < ranks ? out - begin - o : 0;
    const int64_t at = int64_t{begin + o} * ranks + first + j;
    const P* from = global<const P>(B != nullptr ? B + at : nullptr);
    P share[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      share[v] = v * kOutputs < left ? from[v * kOutputs * ranks] : P{};
    }
#pragma unroll
    for (int v = 0; v < kCount; ++v) row(j)[o + v * kOutputs] = share[v];
  }

  // Saves to dB (out, ranks) what `load` loads from B.
  __device__ __forceinline__ void save(P* dB, int out, int ranks, int begin, int first) const {
    const int j = threadIdx.x % most, o = threadIdx.x / most;
    const int left = first + j < ranks ? out - begin - o : 0;
    P* to = global<P>(dB + int64_t{begin + o} * ranks + first + j);
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      if (v * kOutputs < left) to[v * kOutputs * ranks] = row(j)[o + v * kOutputs];
    }
  }
};

}  // namespace rasa_ext
