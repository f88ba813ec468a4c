// pack: the adapter's parameters of every layer of a group, as the two matrices that GEMMs read.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "layers.cuh"

namespace rasa_ext {

struct PackParams {
  PackGroup group;
  Layers<PackLayer> layers;
};
static_assert(sizeof(PackParams) <= 4096, "kernel parameters");

// A warp computes to = from * scale for the n <= kPiece elements of a piece; zeros if `from` is
// null.
template <int N, typename P, typename T>
__device__ __forceinline__ void copy_piece(const P* from, T* to, int n, Wide<P> scale) {
  constexpr int kCount = kPiece / kWarp / N;
  const int lane = threadIdx.x % kWarp;
  Vector<P, N> source[kCount];
  Vector<T, N> scaled[kCount];
  load_share(from, from != nullptr ? n : 0, lane, kWarp, source);
  scale_share(source, scale, scaled);
  store_share(to, n, lane, kWarp, scaled);
}

//     Ap = [A ; A_pool ; 0]        Bp = diag(d) [B ; B_pool ; 0]
//
// blockIdx.y is the layer. A warp takes one piece of a row: first the pieces of Ap, then the pieces
// of Bp. Warps beyond the last piece do nothing.
template <typename P, typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    pack_kernel(const __grid_constant__ PackParams params) {
  const PackGroup& group = params.group;
  const PackLayer layer = params.layers[blockIdx.y];
  int piece = blockIdx.x * (kStreamThreads / kWarp) + threadIdx.x / kWarp;
  const int down = group.Rp * pieces_of(group.in);
  const bool up = piece >= down;
  if (up) piece -= down;
  const int width = up ? group.out : group.in, across = max(pieces_of(width), 1);
  const int row = piece / across, begin = piece % across * kPiece;
  if (row >= group.Rp) return;

  const P* own = global<const P>(up ? layer.B : layer.A);             // (own, width)
  const P* pool = global<const P>(up ? group.B_pool : group.A_pool);  // (pooled, width)
  const P* d = global<const P>(layer.d);                              // (own + pooled,)
  T* to = global<T>(up ? group.Bp : group.Ap);                        // (layers, Rp, width)
  const bool pad = row >= group.own + group.pooled;
  const P* from = row < group.own ? own : pool;
  const int64_t from_row = row < group.own ? row : row - group.own;
  from = global<const P>(pad ? nullptr : from + from_row * width + begin);
  to += (int64_t{blockIdx.y} * group.Rp + row) * width + begin;
  const Wide<P> scale = up && !pad && d != nullptr ? widen(d[row]) : Wide<P>(1);
  const int n = min(kPiece, width - begin);
  constexpr int N = kStep<P, T>;
  if (width % N == 0 && is_aligned(from) && is_aligned(to)) {
    copy_piece<N>(from, to, n, scale);
  } else {
    copy_piece<1>(from, to, n, scale);
  }
}

}  // namespace rasa_ext
