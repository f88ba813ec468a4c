// pack: the adapter's parameters of every layer of a group, as the two matrices that GEMMs read.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "layers.cuh"
#include "tile.cuh"

namespace rasa_ext {

struct PackParams {
  PackGroup group;
  int ups;  // blocks that each take a tile of one layer's Bp
  Layers<PackLayer> layers;
};
static_assert(sizeof(PackParams) <= 4096, "kernel parameters");

// A warp computes to = from * scale for a piece of a row that has n elements left; zeros if `pad`.
template <int N, typename P, typename T>
__device__ __forceinline__ void copy_piece(const P* from, bool pad, T* to, int n, Wide<P> scale) {
  constexpr int kCount = kPiece / kWarp / N;
  const int lane = threadIdx.x % kWarp;
  Vector<P, N> source[kCount];
  Vector<T, N> scaled[kCount];
  load_share(from, pad ? 0 : n, lane, kWarp, source);
  scale_share(source, scale, scaled);
  store_share(to, n, lane, kWarp, scaled);
}

template <typename P>
using PackTile = Tile<P, kRanks, kPiece>;

// A block computes a tile of Bp, a warp for each rank.
template <typename P, typename T>
__device__ __forceinline__ void pack_up(const PackParams& params) {
  RASA_SHARED(P, shared);
  const PackTile<P> tile{shared};
  const PackGroup& group = params.group;
  const PackLayer layer = params.layers[blockIdx.y];
  const int out = group.out, across = pieces_of(out), R = group.own + group.pooled;
  const int begin = blockIdx.x % across * kPiece;
  const Ranks ranks = ranks_of(blockIdx.x / across, group.own, kRanks);
  const P* B = global<const P>(ranks.own ? layer.B : group.B_pool);  // (out, own or pooled)
  tile.load(B, out, ranks.own ? group.own : group.pooled, begin, ranks.column);
  __syncthreads();
  const int j = threadIdx.x / kWarp, row = ranks.first + j;
  if (row >= (ranks.own ? group.own : group.Rp)) return;
  const P* d = global<const P>(layer.d);  // (R,)
  T* to = global<T>(group.Bp);            // (layers, Rp, out)
  to += (int64_t{blockIdx.y} * group.Rp + row) * out + begin;
  const Wide<P> scale = row < R && d != nullptr ? widen(d[row]) : Wide<P>(1);
  const int n = out - begin;
  constexpr int N = kStep<P, T>;
  if (out % N == 0 && is_aligned(to)) {
    copy_piece<N>(tile.row(j), false, to, n, scale);
  } else {
    copy_piece<1>(tile.row(j), false, to, n, scale);
  }
}

//     Ap = [A ; A_pool ; 0]        Bp = diag(d) [B | B_pool | 0]^T
//
// blockIdx.y is the layer. The first blocks take tiles of Bp. A warp of the other blocks takes one
// piece of a row of Ap; warps beyond the last piece do nothing.
template <typename P, typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    pack_kernel(const __grid_constant__ PackParams params) {
  const int block = blockIdx.x;
  if (block < params.ups) return pack_up<P, T>(params);
  const PackGroup& group = params.group;
  const int piece = (block - params.ups) * (kStreamThreads / kWarp) + threadIdx.x / kWarp;
  const int in = group.in, across = pieces_of(in);
  const int row = piece / across, begin = piece % across * kPiece;
  if (row >= group.Rp) return;

  const bool own = row < group.own, pad = row >= group.own + group.pooled;
  const P* from = global<const P>(own ? params.layers[blockIdx.y].A : group.A_pool);  // (_, in)
  const int64_t from_row = own ? row : row - group.own;
  from = global<const P>(pad ? nullptr : from + from_row * in + begin);
  T* to = global<T>(group.Ap);  // (layers, Rp, in)
  to += (int64_t{blockIdx.y} * group.Rp + row) * in + begin;
  const int n = in - begin;
  constexpr int N = kStep<P, T>;
  if (in % N == 0 && is_aligned(from) && is_aligned(to)) {
    copy_piece<N>(from, pad, to, n, Wide<P>(1));
  } else {
    copy_piece<1>(from, pad, to, n, Wide<P>(1));
  }
}

}  // namespace rasa_ext
