// pack_backward: the gradients of the adapter's parameters from the gradients of the pack.
//
// With B* = [B | B_pool] (out, R), for every rank j, a column of B* and a row of dBp
//
//     [dA ; dA_pool] = dAp        [dB | dB_pool]_j = d_j dBp_j        dd_j = <B*_j, dBp_j>
//
// The pool's gradients are sums over the layers i of a group: sum_i dA_pool_i and sum_i dB_pool_i.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "layers.cuh"
#include "tile.cuh"

namespace rasa_ext {

struct PackBackwardParams {
  PackBackwardGroup group;
  int dots;                  // blocks that each take some ranks of one layer's dBp
  int sums;                  // blocks that each take a tile of dB_pool
  bool whole_in, whole_out;  // rows of `in` and of `out` elements are 16-byte aligned
  Layers<PackBackwardLayer> layers;
};
static_assert(sizeof(PackBackwardParams) <= 4096, "kernel parameters");

template <typename P>
__device__ __forceinline__ Wide<P> scale_of(const PackBackwardLayer& layer, int row) {
  return layer.d != nullptr ? widen(global<const P>(layer.d)[row]) : Wide<P>(1);
}

// ---- The first blocks: dd and dB of some ranks of one layer ----

// Outputs that a block takes at a time: several warps take each rank.
template <typename W>
constexpr int kDotOutputs = kStreamThreads / kDotRanks * kDotBytes / static_cast<int>(sizeof(W));

template <typename P>
using DotTile = Tile<P, kDotRanks, kDotOutputs<Wide<P>>>;

// Bytes of shared memory of a block: a tile, and a sum for each warp.
template <typename P>
constexpr int kBackwardBytes = DotTile<P>::kBytes + kStreamThreads / kWarp * sizeof(Wide<P>);

// A block computes dd_j and dB_j of neighbouring ranks j from the rows j of layer i's dBp. It
// writes dB_pool only if the group has a single layer. With several layers dB_pool is a sum, which
// sum_pool computes.
template <int N, typename P>
__device__ __forceinline__ void up_ranks(const PackBackwardParams& params, int i, int number) {
  using W = Wide<P>;
  constexpr int kCount = kDotBytes / static_cast<int>(sizeof(W)) / N;
  constexpr int kWarps = kStreamThreads / kWarp, kThreads = kStreamThreads / kDotRanks;  // of a row
  RASA_SHARED(P, shared);
  const DotTile<P> tile{shared};
  W* warp_sums = reinterpret_cast<W*>(shared + DotTile<P>::kBytes / sizeof(P));  // (kWarps,)
  const PackBackwardGroup& group = params.group;
  const PackBackwardLayer layer = params.layers[i];
  const Ranks ranks = ranks_of(number, group.own, kDotRanks);
  const int out = group.out, columns = ranks.own ? group.own : group.pooled;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, rank = warp % kDotRanks;
  const int j = ranks.first + rank, thread = warp / kDotRanks * kWarp + lane;
  const bool live = ranks.column + rank < columns;                   // whether there is a rank j
  const W* dBp = global<const W>(layer.dBp) + int64_t{j} * out;      // (out,)
  const P* B = global<const P>(ranks.own ? layer.B : group.B_pool);  // (out, columns)
  P* dB = global<P>(ranks.own ? group.dB : group.layers == 1 ? group.dB_pool : nullptr);
  if (ranks.own) dB += int64_t{i} * out * columns;  // (out, columns)
  P* dd = global<P>(group.dd);                      // (layers, R)
  const W scale = live ? scale_of<P>(layer, j) : W(1);
  W sum = 0;
  for (int begin = 0; begin < out; begin += kDotOutputs<W>) {
    Vector<W, N> grad[kCount];
    load_share(dBp + begin, live ? out - begin : 0, thread, kThreads, grad);
    if (dd != nullptr) tile.load(B, out, columns, begin, ranks.column);
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      P* const here = tile.row(rank) + (v * kThreads + thread) * N;
      const Vector<P, N> other = dd != nullptr ? load<N>(here) : Vector<P, N>{};
      Vector<P, N> scaled;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        sum += widen(other.at[e]) * grad[v].at[e];
        scaled.at[e] = narrow<P>(grad[v].at[e] * scale);
      }
      put_aligned(here, scaled);
    }
    __syncthreads();
    if (dB != nullptr) tile.save(dB, out, columns, begin, ranks.column);
  }
  if (dd == nullptr) return;
  sum = sum_over_lanes<kWarp>(sum);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (thread != 0 || !live) return;
  W all = 0;
#pragma unroll
  for (int from = 0; from < kWarps; from += kDotRanks) all += warp_sums[from + rank];
  dd[int64_t{i} * (group.own + group.pooled) + j] = narrow<P>(all);
}

// ---- The other blocks: sums over layers, and dA ----

// A thread computes its share of a piece of row j of dAp, or of row j of dBp times d_j: the sum
// over the layers [first, last), in order and in the accumulation type.
template <int N, int count, typename P>
__device__ __forceinline__ void sum_piece(const PackBackwardParams& params, int first, int last,
                                          bool up, int j, int begin, Vector<P, N> (&to)[count]) {
  using W = Wide<P>;
  const int width = up ? params.group.out : params.group.in;
  const int n = width - begin, lane = threadIdx.x % kWarp;
  Vector<W, N> sum[count] = {};
#pragma unroll 4
  for (int i = first; i < last; ++i) {
    const PackBackwardLayer layer = params.layers[i];
    const W* from = global<const W>(up ? layer.dBp : layer.dAp);  // (Rp, width)
    const W scale = up ? scale_of<P>(layer, j) : W(1);
    Vector<W, N> part[count];
    load_share(from + int64_t{j} * width + begin, n, lane, kWarp, part);
#pragma unroll
    for (int v = 0; v < count; ++v) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum[v].at[e] += part[v].at[e] * scale;
    }
  }
  scale_share(sum, W(1), to);
}

template <typename P>
using PoolTile = Tile<P, kRanks, kPiece>;
static_assert(PoolTile<double>::kBytes <= kBackwardBytes<double>, "fits in a block's memory");
static_assert(PoolTile<float>::kBytes <= kBackwardBytes<float>, "fits in a block's memory");

// A block computes a tile of dB_pool, a warp for each rank.
template <int N, typename P>
__device__ __forceinline__ void sum_pool(const PackBackwardParams& params, int block) {
  RASA_SHARED(P, shared);
  const PoolTile<P> tile{shared};
  const PackBackwardGroup& group = params.group;
  const int out = group.out, across = pieces_of(out);
  const int column = block / across * kRanks, begin = block % across * kPiece;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (column + warp < group.pooled) {
    constexpr int kCount = kPiece / kWarp / N;
    Vector<P, N> sum[kCount];
    sum_piece(params, 0, group.layers, true, group.own + column + warp, begin, sum);
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      put_aligned(tile.row(warp) + (v * kWarp + lane) * N, sum[v]);
    }
  }
  __syncthreads();
  tile.save(global<P>(group.dB_pool), out, group.pooled, begin, column);
}

// A warp computes a piece of a row: of a layer's dA, or of dA_pool after the rows of all layers.
template <int N, typename P>
__device__ __forceinline__ void down_piece(const PackBackwardParams& params, int piece) {
  const PackBackwardGroup& group = params.group;
  const int in = group.in, own = group.own, across = pieces_of(in), rows = group.layers * own;
  const int row = piece / across, begin = piece % across * kPiece;
  if (row >= rows + group.pooled) return;
  const bool pool = row >= rows;
  const int first = pool ? 0 : row / own, last = pool ? group.layers : first + 1;
  const int j = pool ? own + row - rows : row % own;
  P* to = global<P>(pool ? group.dA_pool : group.dA);
  to += int64_t{pool ? row - rows : row} * in + begin;
  Vector<P, N> sum[kPiece / kWarp / N];
  sum_piece(params, first, last, false, j, begin, sum);
  store_share(to, in - begin, threadIdx.x % kWarp, kWarp, sum);
}

template <typename P>
__global__ void __launch_bounds__(kStreamThreads, kGradBlocks)
    pack_backward_kernel(const __grid_constant__ PackBackwardParams params) {
  constexpr int N = kPer16Bytes<Wide<P>>;
  int block = blockIdx.x;
  if (block < params.dots) {
    const int groups = groups_of(params.group.own, params.group.pooled, kDotRanks);
    return params.whole_out ? up_ranks<N, P>(params, block / groups, block % groups)
                            : up_ranks<1, P>(params, block / groups, block % groups);
  }
  block -= params.dots;
  if (block < params.sums) {
    return params.whole_out ? sum_pool<N, P>(params, block) : sum_pool<1, P>(params, block);
  }
  const int piece = (block - params.sums) * (kStreamThreads / kWarp) + threadIdx.x / kWarp;
  return params.whole_in ? down_piece<N, P>(params, piece) : down_piece<1, P>(params, piece);
}

}  // namespace rasa_ext
