// Products with one narrow side, on tensor cores, from one read of the wide matrix S (M, N):
//
//     down: D = scale * keep(S) P^T       grad: C = Q^T keep(S)
//
// S is x or a gradient, P is (Rp, N), Q is (M, Rp), and keep(S) is S with the elements that
// dropout's mask drops set to 0. Tiles of S pass through a ring in shared memory. Each block writes
// float32 sums over its part of the features (down) or of the tokens (grad) to a workspace, and
// sum_kernel adds them up in order.
//
// Ranks from Rp to R, features from N on and tokens from M on are zero in shared memory, and their
// results are not written. Rows in shared memory have 16 extra bytes, so that eight rows at one
// column are in different banks.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "launchers.h"

namespace rasa_ext {

constexpr int kPad = 8;

struct SkinnyParams {
  SkinnyCall call;
  float* down_parts;  // (parts, M, Rp)
  float* grad_parts;  // (groups, Rp, N)
  int part, group;    // features and tokens that a block takes
};

// Shared memory of one stage of the ring: a tile of S, a tile of P or Q, and the mask of S's tile.
template <typename T, int tokens, int features, int narrow_rows, int narrow_cols>
struct Stage {
  T S[tokens][features + kPad];
  T narrow[narrow_rows][narrow_cols + kPad];
  uint32_t mask[tokens][features / 32];
};

// Starts the copy to = from[row..., col...], with zeros in rows from `rows_end` on and columns from
// `cols_end` on. `from` is 16-byte aligned, and `stride` and `col`, in elements of T, keep that.
template <typename T, int rows, int cols>
__device__ __forceinline__ void fetch(T (&to)[rows][cols], const void* from, int64_t stride,
                                      int row, int rows_end, int col, int cols_end) {
  constexpr int N = kPer16Bytes<T>, kAcross = (cols - kPad) / N, kAll = rows * kAcross;
#pragma unroll
  for (int start = 0; start < kAll; start += kSkinnyThreads) {
    const int i = start + threadIdx.x, r = i / kAcross, c = i % kAcross * N;
    if (i >= kAll) break;
    const bool wanted = row + r < rows_end && col + c < cols_end;
    const int64_t at = wanted ? (row + r) * stride + (col + c) : 0;
    copy_async<16>(&to[r][c], static_cast<const T*>(from) + at, wanted);
  }
}

// Starts the copy of a tile's mask: one bit per element, one word per thread. `features` is a
// multiple of 32.
template <int tokens, int words>
__device__ __forceinline__ void fetch_mask(uint32_t (&to)[tokens][words], const uint8_t* mask,
                                           int features, int row, int rows_end, int col) {
  static_assert(tokens * words == kSkinnyThreads, "a word a thread");
  const int r = threadIdx.x / words, c = threadIdx.x % words, line = features / 32;
  const bool wanted = row + r < rows_end && col + c * 32 < features;
  const int64_t at = wanted ? static_cast<int64_t>(row + r) * line + (col / 32 + c) : 0;
  copy_async<4>(&to[r][c], mask + 4 * at, wanted);
}

// Keeps the low 16-bit number if bit 0 of `low` is set, and the high one if bit 0 of `high` is set;
// zeros the others.
__device__ __forceinline__ uint32_t keep_two(uint32_t two, uint32_t low, uint32_t high) {
  return two & ((low & 1) | (high & 1) << 16) * 0xffff;
}

// Loads the 16 x 16 tile at `row`, `col` as operand A of multiply_matrices.
template <typename T, int rows, int cols>
__device__ __forceinline__ void load_rows(uint32_t (&to)[4], const T (&from)[rows][cols], int row,
                                          int col) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(to, &from[row + lane % 16][col + lane / 16 * 8]);
}

// Loads the 16 x 16 tile at `row`, `col` whose rows are columns of B: matrices 0 and 1 have columns
// 0 to 7 of B, matrices 2 and 3 columns 8 to 15.
template <typename T, int rows, int cols>
__device__ __forceinline__ void load_columns(uint32_t (&to)[4], const T (&from)[rows][cols],
                                             int row, int col) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(to, &from[row + lane / 16 * 8 + lane % 8][col + lane / 8 % 2 * 8]);
}

// Stores a warp's sum (16, 8) at row `row` and column `col` of `to` (rows, cols), but nothing
// outside.
__device__ __forceinline__ void store_sum(float* to, const float (&sum)[4], int row, int rows,
                                          int col, int cols) {
  const int lane = threadIdx.x % kWarp;
  row += lane / 4;
  col += lane % 4 * 2;
  if (col >= cols) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 < rows) {
      store(to + static_cast<int64_t>(row + half * 8) * cols + col,
            Vector<float, 2>{{sum[2 * half], sum[2 * half + 1]}});
    }
  }
}

template <typename T, int R>
using DownStage = Stage<T, kDownTokens, kDownFeatures, R, kDownFeatures>;

template <int R>
constexpr int kDownRing = R > kBothRanks ? kRingOfManyRanks : kRing;

// down_parts[y] = keep(S) P^T over part blockIdx.y of the features, for kDownTokens tokens.
template <typename T, int R>
__global__ void __launch_bounds__(kSkinnyThreads, R > kBothRanks ? 1 : 2)
    down_kernel(const __grid_constant__ SkinnyParams params) {
  using Tile = DownStage<T, R>;
  constexpr int kStages = kDownRing<R>;
  RASA_SHARED(Tile, ring);
  const SkinnyCall& call = params.call;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int token = blockIdx.x * kDownTokens;
  const int begin = blockIdx.y * params.part, end = min(begin + params.part, call.N);
  const auto ask = [&](int step) {
    const int col = begin + step * kDownFeatures;
    if (col < end) {
      Tile& stage = ring[step % kStages];
      fetch(stage.S, call.S, call.S_stride, token, call.M, col, end);
      fetch(stage.narrow, call.P, call.P_stride, 0, call.Rp, col, end);
      if (call.mask != nullptr) fetch_mask(stage.mask, call.mask, call.N, token, call.M, col);
    }
    commit_copies();
  };
  float sum[R / 8][4] = {};
  for (int step = 0; step + 1 < kStages; ++step) ask(step);
  for (int step = 0; begin + step * kDownFeatures < end; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage is complete, and no thread reads the previous one any more
    ask(step + kStages - 1);
    const Tile& stage = ring[step % kStages];
#pragma unroll
    for (int k = 0; k < kDownFeatures; k += 16) {
      uint32_t a[4];
      load_rows(a, stage.S, warp * 16, k);
      if (call.mask != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int shift = k % 32 + lane % 4 * 2;
          const uint32_t bits = stage.mask[warp * 16 + lane / 4 + half * 8][k / 32] >> shift;
          a[half] = keep_two(a[half], bits, bits >> 1);
          a[half + 2] = keep_two(a[half + 2], bits >> 8, bits >> 9);
        }
      }
#pragma unroll
      for (int j = 0; j < R; j += 16) {
        uint32_t b[4];
        load_columns(b, stage.narrow, j, k);
        multiply_matrices<T>(sum[j / 8], a, b[0], b[1]);
        multiply_matrices<T>(sum[j / 8 + 1], a, b[2], b[3]);
      }
    }
  }
  float* parts = params.down_parts + static_cast<int64_t>(blockIdx.y) * call.M * call.Rp;
#pragma unroll
  for (int j = 0; j < R / 8; ++j) {
    store_sum(parts, sum[j], token + warp * 16, call.M, j * 8, call.Rp);
  }
}

template <bool both>
constexpr int kTileTokens = both ? kBothTokens : kGradTokens;
template <bool both>
constexpr int kTileFeatures = both ? kBothFeatures : kGradFeatures;

template <typename T, int R, bool both>
using GradStage = Stage<T, kTileTokens<both>, kTileFeatures<both>, kTileTokens<both>, R>;

template <int R, bool both>
constexpr int kGradStages = R > (both ? 48 : kBothRanks) ? kRingOfManyRanks : kRing;

// The ring, and the slice of P if both products are computed.
template <typename T, int R, bool both>
struct GradShared {
  GradStage<T, R, both> ring[kGradStages<R, both>];
  T P[both ? R : 1][kTileFeatures<both> + kPad];
};

// down_parts[x] = S P^T of one tile, over this block's features. A warp takes 16 tokens and 16
// ranks at a time.
template <int R, typename T, int tokens, int features>
__device__ __forceinline__ void down_of_tile(const T (&S)[tokens][features],
                                             const T (&P)[R][features], const SkinnyParams& params,
                                             int token, int end) {
  const SkinnyCall& call = params.call;
  const int warp = threadIdx.x / kWarp;
  float* parts = params.down_parts + static_cast<int64_t>(blockIdx.x) * call.M * call.Rp;
  for (int unit = warp; unit < tokens / 16 * (R / 16); unit += kSkinnyThreads / kWarp) {
    const int row = unit % (tokens / 16) * 16, rank = unit / (tokens / 16) * 16;
    float sum[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < features - kPad; k += 16) {
      uint32_t a[4], b[4];
      load_rows(a, S, row, k);
      load_columns(b, P, rank, k);
      multiply_matrices<T>(sum[0], a, b[0], b[1]);
      multiply_matrices<T>(sum[1], a, b[2], b[3]);
    }
    store_sum(parts, sum[0], token + row, end, rank, call.Rp);
    store_sum(parts, sum[1], token + row, end, rank + 8, call.Rp);
  }
}

// grad_parts[y] = Q^T keep(S) over group blockIdx.y of the tokens, for the features of a tile. With
// `both`, which excludes a mask, also down_parts[x] for these tokens.
template <typename T, int R, bool both>
__global__ void __launch_bounds__(kSkinnyThreads, R > kBothRanks || (both && R > 48) ? 1 : 2)
    grad_kernel(const __grid_constant__ SkinnyParams params) {
  using Shared = GradShared<T, R, both>;
  constexpr int kTokens = kTileTokens<both>, kFeatures = kTileFeatures<both>;
  constexpr int kStages = kGradStages<R, both>, kColumns = kFeatures / (kSkinnyThreads / kWarp);
  static_assert(kColumns <= 32, "a word of the mask");
  RASA_SHARED(Shared, shared);
  const SkinnyCall& call = params.call;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int feature = blockIdx.x * kFeatures, column = warp * kColumns;
  const int begin = blockIdx.y * params.group, end = min(begin + params.group, call.M);
  const auto ask = [&](int step) {
    const int token = begin + step * kTokens;
    if (token < end) {
      auto& stage = shared->ring[step % kStages];
      fetch(stage.S, call.S, call.S_stride, token, end, feature, call.N);
      fetch(stage.narrow, call.Q, call.Q_stride, token, end, 0, call.Rp);
      if (!both && call.mask != nullptr) {
        fetch_mask(stage.mask, call.mask, call.N, token, end, feature);
      }
    }
    commit_copies();
  };
  if constexpr (both) fetch(shared->P, call.P, call.P_stride, 0, call.Rp, feature, call.N);
  float sum[R / 16][kColumns / 8][4] = {};
  for (int step = 0; step + 1 < kStages; ++step) ask(step);
  for (int step = 0; begin + step * kTokens < end; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage is complete, and no thread reads the previous one any more
    ask(step + kStages - 1);
    const auto& stage = shared->ring[step % kStages];
#pragma unroll
    for (int k = 0; k < kTokens; k += 16) {
      uint32_t b[kColumns / 16][4];
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        load_transposed(b[n], &stage.S[k + lane % 16][column + n * 16 + lane / 16 * 8]);
      }
      if (!both && call.mask != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = k + half * 8 + lane % 4 * 2, shift = column % 32 + lane / 4;
          const uint32_t low = stage.mask[row][column / 32] >> shift;
          const uint32_t high = stage.mask[row + 1][column / 32] >> shift;
#pragma unroll
          for (int n = 0; n < kColumns / 16; ++n) {
            b[n][half] = keep_two(b[n][half], low >> n * 16, high >> n * 16);
            b[n][half + 2] = keep_two(b[n][half + 2], low >> (n * 16 + 8), high >> (n * 16 + 8));
          }
        }
      }
#pragma unroll
      for (int j = 0; j < R; j += 16) {
        uint32_t a[4];
        load_transposed(a, &stage.narrow[k + lane / 16 * 8 + lane % 8][j + lane / 8 % 2 * 8]);
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          multiply_matrices<T>(sum[j / 16][2 * n], a, b[n][0], b[n][1]);
          multiply_matrices<T>(sum[j / 16][2 * n + 1], a, b[n][2], b[n][3]);
        }
      }
    }
    if constexpr (both) down_of_tile<R>(stage.S, shared->P, params, begin + step * kTokens, end);
  }
  float* parts = params.grad_parts + static_cast<int64_t>(blockIdx.y) * call.Rp * call.N;
#pragma unroll
  for (int j = 0; j < R / 16; ++j) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      store_sum(parts, sum[j][n], j * 16, call.Rp, feature + column + n * 8, call.N);
    }
  }
}

// to = scale * (parts[0] + parts[1] + ...). Rows of `to` have `cols` elements and start `stride`
// elements apart.
struct Parts {
  const float* from;  // (count, rows, cols)
  void* to;
  int64_t rows, stride;
  int cols, count;
  float scale;
};

template <typename T>
__device__ __forceinline__ void add_parts(const Parts& parts, int64_t thread) {
  constexpr int N = 4, kAtOnce = 4;
  const int64_t all = parts.rows * parts.cols, at = thread * N;
  if (at >= all) return;
  Vector<float, N> sum{};
  for (int i = 0; i < parts.count; i += kAtOnce) {
    Vector<float, N> some[kAtOnce];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (i + p < parts.count) some[p] = load<N>(parts.from + (i + p) * all + at);
    }
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (i + p >= parts.count) break;
#pragma unroll
      for (int v = 0; v < N; ++v) sum.at[v] += some[p].at[v];
    }
  }
  Vector<T, N> result;
#pragma unroll
  for (int v = 0; v < N; ++v) result.at[v] = narrow<T>(sum.at[v] * parts.scale);
  store(static_cast<T*>(parts.to) + at / parts.cols * parts.stride + at % parts.cols, result);
}

// Adds up `down`'s parts in the first blocks and `grad`'s in the others. Either may have none.
template <typename T>
__global__ void __launch_bounds__(kSkinnyThreads)
    sum_kernel(const __grid_constant__ Parts down, const __grid_constant__ Parts grad,
               int down_blocks) {
  const int block = blockIdx.x;
  if (block < down_blocks) {
    add_parts<T>(down, static_cast<int64_t>(block) * kSkinnyThreads + threadIdx.x);
  } else {
    add_parts<float>(grad,
                     static_cast<int64_t>(block - down_blocks) * kSkinnyThreads + threadIdx.x);
  }
}

}  // namespace rasa_ext
