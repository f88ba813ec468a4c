// pack: the adapter's parameters of one layer, or of many, as the two matrices that GEMMs read.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "launchers.h"

namespace rasa_ext {

struct PackParams {
  PackLayer one;           // where there is no table
  const PackLayer* table;  // (gridDim.y,)
  int tile;                // elements of Bt that a block assembles
};
static_assert(sizeof(PackParams) <= 4096, "kernel parameters");

// How Bt (out, Rp) is cut: whole rows, so that a tile is one stretch of memory; a rank that fills a
// tile alone is cut across.
struct UpTiling {
  int rows, cols;  // of a full tile
  int across;      // tiles to a row: 1, unless the rank fills a tile alone
  int count;
};

__host__ __device__ __forceinline__ UpTiling up_tiling(int out, int Rp, int tile) {
  UpTiling tiling;
  tiling.cols = Rp < tile ? Rp : tile;
  tiling.across = (Rp + tiling.cols - 1) / tiling.cols;
  tiling.rows = tile / tiling.cols;
  tiling.count = (out + tiling.rows - 1) / tiling.rows * tiling.across;
  return tiling;
}

// Stretches of Ap.
__host__ __device__ __forceinline__ int down_blocks(int in, int Rp) {
  return static_cast<int>((static_cast<int64_t>(Rp) * in + kCopyElements - 1) / kCopyElements);
}

// to[row * cols + col] = from[row * ld + col] * d[col] for row < rows, col < width, by the block.
template <typename P, typename T>
__device__ __forceinline__ void scale_columns(const P* from,  // (rows, width), rows ld apart
                                              const P* d,     // (width,)
                                              T* to,          // (rows, width), rows cols apart
                                              int rows, int width, int ld, int cols) {
  constexpr int N = kPer16Bytes<P>;
  if (width % N == 0 && ld % N == 0 && is_aligned(from)) {
    for (Walk at(width / N); at.row < rows; at.next()) {
      const Vector<P, N> source = load<N>(from + static_cast<int64_t>(at.row) * ld + at.col * N);
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const int col = at.col * N + v;
        to[at.row * cols + col] = narrow<T>(widen(source.at[v]) * widen(d[col]));
      }
    }
  } else {
    for (Walk at(width); at.row < rows; at.next()) {
      const P source = from[static_cast<int64_t>(at.row) * ld + at.col];
      to[at.row * cols + at.col] = narrow<T>(widen(source) * widen(d[at.col]));
    }
  }
}

// Ap = [A ; A_pool ; 0] as one stretch of memory, of which this is elements [begin, end).
template <typename P, typename T>
__device__ __forceinline__ void pack_down(const PackLayer& layer, int64_t begin, int64_t end) {
  const P* A = global<const P>(layer.A);            // (own, in)
  const P* A_pool = global<const P>(layer.A_pool);  // (pooled, in)
  T* Ap = global<T>(layer.Ap);                      // (Rp, in)
  const int64_t own_end = static_cast<int64_t>(layer.own) * layer.in;
  const int64_t pool_end = own_end + static_cast<int64_t>(layer.pooled) * layer.in;
  if (begin < own_end) {
    copy_cast(A + begin, Ap + begin, static_cast<int>(min(end, own_end) - begin));
  }
  if (begin < pool_end && end > own_end) {
    const int64_t from = max(begin, own_end);
    copy_cast(A_pool + (from - own_end), Ap + from, static_cast<int>(min(end, pool_end) - from));
  }
  if (end > pool_end) {
    const int64_t from = max(begin, pool_end);
    fill_zero(Ap + from, static_cast<int>(end - from));
  }
}

// Bt = [B | B_pool | 0] diag(d): one tile of it, assembled in shared memory since the sources' rows
// are too short and too crooked for stores of 16 bytes.
template <typename P, typename T>
__device__ __forceinline__ void pack_up(const PackLayer& layer, const UpTiling& tiling, int index) {
  RASA_SHARED(T, tile);
  const P* B = global<const P>(layer.B);            // (out, own)
  const P* B_pool = global<const P>(layer.B_pool);  // (out, pooled)
  const P* d = global<const P>(layer.d);            // (R,)
  T* Bt = global<T>(layer.Bt);                      // (out, Rp)
  const int row = index / tiling.across * tiling.rows, col = index % tiling.across * tiling.cols;
  const int rows = min(tiling.rows, layer.out - row), cols = min(tiling.cols, layer.Rp - col);

  const int R = layer.own + layer.pooled, end = col + cols;
  const int own_end = min(end, layer.own), pool_begin = max(col, layer.own), pool_end = min(end, R);
  if (col < own_end) {
    scale_columns(B + static_cast<int64_t>(row) * layer.own + col, d + col, tile, rows,
                  own_end - col, layer.own, cols);
  }
  if (pool_begin < pool_end) {
    scale_columns(B_pool + static_cast<int64_t>(row) * layer.pooled + (pool_begin - layer.own),
                  d + pool_begin, tile + (pool_begin - col), rows, pool_end - pool_begin,
                  layer.pooled, cols);
  }
  if (end > R) {
    const int from = max(col, R);
    for (Walk at(end - from); at.row < rows; at.next()) {
      tile[at.row * cols + (from - col) + at.col] = narrow<T>(0);
    }
  }
  __syncthreads();
  // Whole rows, or part of one: either way one stretch of Bt.
  copy_cast(tile, Bt + static_cast<int64_t>(row) * layer.Rp + col, rows * cols);
}

//     Ap = [A ; A_pool ; 0]        Bt = [B | B_pool | 0] diag(d)
//
// One layer to blockIdx.y. The first blocks of a layer copy stretches of Ap, the others make tiles
// of Bt; blocks beyond a small layer's last have nothing to do. Left to itself ptxas wants 6 blocks
// on a multiprocessor of sm_90, 40 registers a thread, and spills the 41st; 4 leave it 64.
template <typename P, typename T>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks) pack_kernel(PackParams params) {
  const PackLayer layer = params.table != nullptr ? params.table[blockIdx.y] : params.one;
  const int down = down_blocks(layer.in, layer.Rp), block = blockIdx.x;
  if (layer.Rp == 0) return;
  if (block < down) {
    const int64_t begin = static_cast<int64_t>(block) * kCopyElements;
    const int64_t all = static_cast<int64_t>(layer.Rp) * layer.in;
    pack_down<P, T>(layer, begin, min(begin + kCopyElements, all));
    return;
  }
  const UpTiling tiling = up_tiling(layer.out, layer.Rp, params.tile);
  if (block - down < tiling.count) pack_up<P, T>(layer, tiling, block - down);
}

}  // namespace rasa_ext
