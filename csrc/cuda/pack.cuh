// pack: the adapter's parameters of one layer, or of many, as the two matrices that GEMMs read.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "launchers.h"

namespace rasa_ext {

struct PackParams {
  const PackLayer* table;  // (gridDim.y,); null where the layers stand here
  PackLayer layers[kLayersByValue];
};
static_assert(sizeof(PackParams) <= 4096, "kernel parameters");

// Warps that one layer wants: one to each piece of each row of Ap and Bp.
__host__ __device__ __forceinline__ int64_t pieces_of(const PackLayer& layer) {
  return int64_t{layer.Rp} * (pieces_of(layer.in) + pieces_of(layer.out));
}

// to = from * scale for the n <= kPiece elements of a piece, by a warp; zeros where from is null.
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
// One layer to blockIdx.y. A warp takes a piece of a row, first those of Ap, then those of Bp;
// warps beyond a small layer's last have nothing to do.
template <typename P, typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    pack_kernel(const __grid_constant__ PackParams params) {
  const PackLayer layer =
      params.table != nullptr ? params.table[blockIdx.y] : params.layers[blockIdx.y];
  int piece = blockIdx.x * (kStreamThreads / kWarp) + threadIdx.x / kWarp;
  const int down = layer.Rp * pieces_of(layer.in);
  const bool up = piece >= down;
  if (up) piece -= down;
  const int width = up ? layer.out : layer.in, across = max(pieces_of(width), 1);
  const int row = piece / across, begin = piece % across * kPiece;
  if (row >= layer.Rp) return;

  const P* own = global<const P>(up ? layer.B : layer.A);             // (own, width)
  const P* pool = global<const P>(up ? layer.B_pool : layer.A_pool);  // (pooled, width)
  const P* d = global<const P>(layer.d);                              // (own + pooled,)
  T* to = global<T>(up ? layer.Bp : layer.Ap);                        // (Rp, width)
  const bool pad = row >= layer.own + layer.pooled;
  const P* from = row < layer.own ? own : pool;
  const int64_t from_row = row < layer.own ? row : row - layer.own;
  from = global<const P>(pad ? nullptr : from + from_row * width + begin);
  to += int64_t{row} * width + begin;
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
