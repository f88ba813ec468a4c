// pack_backward: the gradients of the adapter's parameters from the gradients of the pack.
//
// Ranks are rows. With B* = [B ; B_pool] (R, out), for every row j
//
//     [dA ; dA_pool] = dAp        [dB ; dB_pool]_j = d_j dBp_j        dd_j = <B*_j, dBp_j>
//
// The pool's gradients are sums over the layers i of a group: sum_i dA_pool_i and sum_i dB_pool_i.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "layers.cuh"

namespace rasa_ext {

struct PackBackwardParams {
  PackBackwardGroup group;
  int dots;                  // blocks that each take one row of one layer's dBp
  bool whole_in, whole_out;  // rows of `in` and of `out` elements are 16-byte aligned
  Layers<PackBackwardLayer> layers;
};
static_assert(sizeof(PackBackwardParams) <= 4096, "kernel parameters");

template <typename P>
__device__ __forceinline__ Wide<P> scale_of(const PackBackwardLayer& layer, int row) {
  return layer.d != nullptr ? widen(global<const P>(layer.d)[row]) : Wide<P>(1);
}

// A block computes dd_j and dB_j from row j of layer i's dBp. For a pooled row it writes dB_pool_j
// only if the group has a single layer. With several layers dB_pool_j is a sum, which sum_piece
// computes.
template <int N, typename P>
__device__ __forceinline__ void up_row(const PackBackwardParams& params, int i, int j) {
  using W = Wide<P>;
  constexpr int kCount = kDotBytes / static_cast<int>(sizeof(W)) / N;
  RASA_SHARED(W, warp_sums);  // (kStreamThreads / kWarp,)
  const PackBackwardGroup& group = params.group;
  const PackBackwardLayer layer = params.layers[i];
  const bool own = j < group.own;
  const int out = group.out, row = own ? j : j - group.own;
  const W* dBp = global<const W>(layer.dBp) + int64_t{j} * out;                     // (out,)
  const P* B = global<const P>(own ? layer.B : group.B_pool) + int64_t{row} * out;  // (out,)
  P* dB = global<P>(own ? group.dB : group.layers == 1 ? group.dB_pool : nullptr);
  const int64_t at = (own ? int64_t{i} * group.own + j : row) * out;
  P* dd = global<P>(group.dd);  // (layers, R)
  const W scale = scale_of<P>(layer, j);
  W sum = 0;
  for (int begin = 0; begin < out; begin += kCount * N * kStreamThreads) {
    const int n = out - begin;
    Vector<W, N> grad[kCount];
    Vector<P, N> other[kCount], scaled[kCount];
    load_share(dBp + begin, n, threadIdx.x, kStreamThreads, grad);
    load_share(B + begin, dd != nullptr ? n : 0, threadIdx.x, kStreamThreads, other);
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum += widen(other[v].at[e]) * grad[v].at[e];
    }
    if (dB == nullptr) continue;
    scale_share(grad, scale, scaled);
    store_share(dB + at + begin, n, threadIdx.x, kStreamThreads, scaled);
  }
  if (dd == nullptr) return;
  sum = sum_over_lanes<kWarp>(sum);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  W all = 0;
#pragma unroll
  for (int warp = 0; warp < kStreamThreads / kWarp; ++warp) all += warp_sums[warp];
  dd[int64_t{i} * (group.own + group.pooled) + j] = narrow<P>(all);
}

// A warp computes one piece of a row of gradients: the sum over the layers [first, last), in order
// and in the accumulation type, of row j of dAp, or of row j of dBp times d_j.
template <int N, typename P>
__device__ __forceinline__ void sum_piece(const PackBackwardParams& params, int first, int last,
                                          bool up, int width, int j, int begin, P* to) {
  using W = Wide<P>;
  constexpr int kCount = kPiece / kWarp / N;
  const int n = min(kPiece, width - begin);
  const int lane = threadIdx.x % kWarp;
  Vector<W, N> sum[kCount] = {};
#pragma unroll 4
  for (int i = first; i < last; ++i) {
    const PackBackwardLayer layer = params.layers[i];
    const W* from = global<const W>(up ? layer.dBp : layer.dAp);  // (Rp, width)
    const W scale = up ? scale_of<P>(layer, j) : W(1);
    Vector<W, N> part[kCount];
    load_share(from + int64_t{j} * width + begin, n, lane, kWarp, part);
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum[v].at[e] += part[v].at[e] * scale;
    }
  }
  Vector<P, N> narrowed[kCount];
  scale_share(sum, W(1), narrowed);
  store_share(to + begin, n, lane, kWarp, narrowed);
}

// The first blocks take one row of dBp each, layer by layer. The warps of the other blocks take
// pieces of rows: of every layer's dA, of dA_pool, and of dB_pool if there are several layers.
template <typename P>
__global__ void __launch_bounds__(kStreamThreads, kGradBlocks)
    pack_backward_kernel(const __grid_constant__ PackBackwardParams params) {
  constexpr int N = kPer16Bytes<Wide<P>>;
  const PackBackwardGroup& group = params.group;
  const int own = group.own, R = own + group.pooled, block = blockIdx.x;
  if (block < params.dots) {
    return params.whole_out ? up_row<N, P>(params, block / R, block % R)
                            : up_row<1, P>(params, block / R, block % R);
  }
  int piece = (block - params.dots) * (kStreamThreads / kWarp) + threadIdx.x / kWarp;
  const int rows = group.layers * own, down = (rows + group.pooled) * pieces_of(group.in);
  const bool up = piece >= down;
  if (up) piece -= down;
  const int width = up ? group.out : group.in, across = max(pieces_of(width), 1);
  // Rows of dB_pool are numbered like rows of dA_pool, after the private rows of all layers.
  const int row = piece / across + (up ? rows : 0), begin = piece % across * kPiece;
  if (row >= rows + group.pooled || (up && group.layers == 1)) return;

  const bool pool = row >= rows;
  const int first = pool ? 0 : row / own, last = pool ? group.layers : first + 1;
  const int j = pool ? own + row - rows : row % own;
  P* to = global<P>(up ? group.dB_pool : pool ? group.dA_pool : group.dA);
  to += int64_t{pool ? row - rows : row} * width;  // (width,)
  return (up ? params.whole_out : params.whole_in)
             ? sum_piece<N>(params, first, last, up, width, j, begin, to)
             : sum_piece<1>(params, first, last, up, width, j, begin, to);
}

}  // namespace rasa_ext
