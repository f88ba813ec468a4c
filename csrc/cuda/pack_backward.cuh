// pack_backward: the gradients of the adapter's parameters from those of the pack.
//
// With T = dBt (out, R), B* = [B | B_pool] (out, R):
//
//     dB = T diag(d)    dd_j = sum_n B*[n, j] T[n, j]    [dA ; dA_pool] = dAp
//
// and over the layers i of a group the pool's gradients are sum_i dA_pool_i, sum_i dB_pool_i.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "launchers.h"

namespace rasa_ext {

struct PackBackwardParams {
  PackBackwardLayer one;           // where there is no table
  const PackBackwardLayer* table;  // (layers,)
  PoolGrads pool;                  // null pointers: left to sum_pool_kernel
  void* partial;                   // (layers, R, tiles) wide: dd of each tile of rows
  int tiles;                       // grad_tiles(out)
};
static_assert(sizeof(PackBackwardParams) <= 4096, "kernel parameters");

__device__ __forceinline__ PackBackwardLayer layer_of(const PackBackwardParams& params, int index) {
  return params.table != nullptr ? params.table[index] : params.one;
}

// A column of the tile, one element longer than needed: a transposing warp then writes to 32 banks.
template <typename W>
struct GradColumn {
  W at[kGradRows + 1];
};

// Columns [col, col + cols) of B* for rows [row, row + rows), transposed into `tile`.
template <typename P>
__device__ __forceinline__ void load_columns(const PackBackwardLayer& layer, int row, int rows,
                                             int col, int cols, GradColumn<Wide<P>>* tile) {
  const P* B = global<const P>(layer.B);            // (out, own)
  const P* B_pool = global<const P>(layer.B_pool);  // (out, pooled)
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, j = col + lane;
  if (lane >= cols) return;
  for (int n = threadIdx.x / kWarp; n < rows; n += warps) {
    const int64_t at = row + n;
    tile[lane].at[n] =
        widen(j < layer.own ? B[at * layer.own + j] : B_pool[at * layer.pooled + (j - layer.own)]);
  }
}

// dB and the tile's share of dd for the rows [index * kGradRows, ...) of T, all columns. A warp
// takes a column, its lanes run along the rows, as T lies in memory.
template <typename P>
__device__ __forceinline__ void up_grads(const PackBackwardParams& params,
                                         const PackBackwardLayer& layer, int index, int number) {
  using W = Wide<P>;
  RASA_SHARED(GradColumn<W>, tile);                   // (kGradCols,)
  const W* T = global<const W>(layer.dBt);            // (Rp, out)
  const P* d = global<const P>(layer.d);              // (R,)
  P* dB = global<P>(layer.dB);                        // (out, own)
  P* dB_pool = static_cast<P*>(params.pool.dB_pool);  // (pooled, out)
  W* partial = static_cast<W*>(params.partial);       // (layers, R, tiles)
  const int R = layer.own + layer.pooled;
  const int row = index * kGradRows, rows = min(kGradRows, layer.out - row);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;

  for (int col = 0; col < R; col += kGradCols) {
    const int cols = min(kGradCols, R - col);
    if (col != 0) __syncthreads();  // the columns before are still being read
    load_columns<P>(layer, row, rows, col, cols, tile);
    __syncthreads();
    for (int c = threadIdx.x / kWarp; c < cols; c += warps) {
      const int j = col + c;
      const W scale = widen(d[j]);
      W sum = 0;
      for (int n = lane; n < rows; n += kWarp) {
        const W t = T[static_cast<int64_t>(j) * layer.out + row + n];
        sum += tile[c].at[n] * t;
        if (j < layer.own) {
          tile[c].at[n] = t * scale;  // written below, by rows
        } else if (dB_pool != nullptr) {
          dB_pool[static_cast<int64_t>(j - layer.own) * layer.out + row + n] = narrow<P>(t * scale);
        }
      }
      sum = sum_over_lanes<kWarp>(sum);
      if (lane == 0) partial[(static_cast<int64_t>(number) * R + j) * params.tiles + index] = sum;
    }
    const int width = min(layer.own - col, cols);
    if (width <= 0) continue;
    __syncthreads();
    for (Walk at(width); at.row < rows; at.next()) {
      dB[static_cast<int64_t>(row + at.row) * layer.own + col + at.col] =
          narrow<P>(tile[at.col].at[at.row]);
    }
  }
}

// Elements [begin, end) of [dA ; dA_pool], which lie in dAp as one stretch.
template <typename P>
__device__ __forceinline__ void down_grads(const PackBackwardLayer& layer, P* dA_pool,
                                           int64_t begin, int64_t end) {
  const Wide<P>* dAp = global<const Wide<P>>(layer.dAp);  // (Rp, in)
  P* dA = global<P>(layer.dA);                            // (own, in)
  const int64_t own_end = static_cast<int64_t>(layer.own) * layer.in;
  if (begin < own_end) {
    copy_cast(dAp + begin, dA + begin, static_cast<int>(min(end, own_end) - begin));
  }
  if (end > own_end && dA_pool != nullptr) {
    const int64_t from = max(begin, own_end);
    copy_cast(dAp + from, dA_pool + (from - own_end), static_cast<int>(end - from));
  }
}

// One layer to blockIdx.y. The first `tiles` blocks take rows of T, the others copy dAp.
template <typename P>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    pack_backward_kernel(PackBackwardParams params) {
  const PackBackwardLayer layer = layer_of(params, blockIdx.y);
  const int block = blockIdx.x;
  if (block < params.tiles) {
    up_grads<P>(params, layer, block, blockIdx.y);
    return;
  }
  P* dA_pool = static_cast<P*>(params.pool.dA_pool);  // (pooled, in)
  const int64_t begin = static_cast<int64_t>(block - params.tiles) * kCopyElements;
  const int64_t all = static_cast<int64_t>(layer.own + layer.pooled) * layer.in;
  down_grads<P>(layer, dA_pool, begin, min(begin + kCopyElements, all));
}

// dd_j = sum over tiles of partial[j, tile], a warp to each j of layer blockIdx.y.
template <typename P>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    sum_dd_kernel(PackBackwardParams params) {
  using W = Wide<P>;
  const PackBackwardLayer layer = layer_of(params, blockIdx.y);
  const int lane = threadIdx.x % kWarp, R = layer.own + layer.pooled;
  const int j = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (j >= R) return;
  const W* partial =
      static_cast<const W*>(params.partial) +
      (static_cast<int64_t>(blockIdx.y) * R + j) * params.tiles;  // (tiles,) of (layers, R, tiles)
  W sum = 0;
  for (int tile = lane; tile < params.tiles; tile += kWarp) sum += partial[tile];
  sum = sum_over_lanes<kWarp>(sum);
  if (lane == 0) global<P>(layer.dd)[j] = narrow<P>(sum);
}

// sum[v] += from[v] * scale for v < n.
template <typename W>
__device__ __forceinline__ void add_scaled(const W* from, int n, W scale, W (&sum)[kSumElements]) {
  if (n == kSumElements && is_aligned(from)) {
    const Vector<W, kSumElements> source = load<kSumElements>(from);
#pragma unroll
    for (int v = 0; v < kSumElements; ++v) sum[v] += source.at[v] * scale;
  } else {
#pragma unroll
    for (int v = 0; v < kSumElements; ++v) {
      if (v < n) sum[v] += from[v] * scale;
    }
  }
}

struct SumPoolParams {
  const PackBackwardLayer* table;  // (layers,)
  int layers;
  PoolGrads pool;
};

//     dA_pool = sum_i dAp_i[own:R]        dB_pool = sum_i T_i[:, own:R] diag(d_i[own:R])
//
// Layers in the order of the table, in wide. Row blockIdx.y of dA_pool (blockIdx.z = 0) or of
// dB_pool by columns (1); a thread sums kSumElements neighbours.
template <typename P>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks)
    sum_pool_kernel(SumPoolParams params) {
  using W = Wide<P>;
  const bool up = blockIdx.z == 1;
  const int row = blockIdx.y, own = params.table[0].own;
  const int width = up ? params.table[0].out : params.table[0].in;
  const int col = (blockIdx.x * blockDim.x + threadIdx.x) * kSumElements;
  const int n = min(kSumElements, width - col);
  if (n <= 0) return;
  W sum[kSumElements] = {};
#pragma unroll 4
  for (int i = 0; i < params.layers; ++i) {
    const PackBackwardLayer& layer = params.table[i];
    const W* from = global<const W>(up ? layer.dBt : layer.dAp);  // (Rp, width)
    const W scale = up ? widen(global<const P>(layer.d)[own + row]) : W(1);
    add_scaled(from + static_cast<int64_t>(own + row) * width + col, n, scale, sum);
  }
  P* to = static_cast<P*>(up ? params.pool.dB_pool : params.pool.dA_pool) +
          static_cast<int64_t>(row) * width + col;  // (pooled, width)
#pragma unroll
  for (int v = 0; v < kSumElements; ++v) {
    if (v < n) to[v] = narrow<P>(sum[v]);
  }
}

}  // namespace rasa_ext
