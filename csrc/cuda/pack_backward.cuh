// pack_backward: the gradients of the adapter's parameters from those of the pack.
//
// Ranks are rows: with B* = [B ; B_pool] (R, out), for every row j
//
//     [dA ; dA_pool] = dAp        [dB ; dB_pool]_j = d_j dBp_j        dd_j = <B*_j, dBp_j>
//
// and over the layers i of a group the pool's gradients are sum_i dA_pool_i, sum_i dB_pool_i.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "layers.cuh"

namespace rasa_ext {

struct PackBackwardParams {
  PackBackwardGroup group;
  int dots;                  // blocks that take a row of some layer's dBp
  bool whole_in, whole_out;  // rows of `in` and of `out` elements begin at 16 bytes
  Layers<PackBackwardLayer> layers;
};
static_assert(sizeof(PackBackwardParams) <= 4096, "kernel parameters");

template <typename P>
__device__ __forceinline__ Wide<P> scale_of(const PackBackwardLayer& layer, int row) {
  return layer.d != nullptr ? widen(global<const P>(layer.d)[row]) : Wide<P>(1);
}

// Row j of layer i's dBp, by a block: dd_j, and dB_j. Of a pooled row only a lone layer writes
// dB_pool_j; that of several is a sum, and sum_piece's.
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

// One piece of a row of gradients, by a warp: the sum over the layers from `first` to before
// `last`, in their order and in wide, of row j of dAp, or of row j of dBp times d_j.
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

// The first blocks take a row of dBp each, of one layer after the other. The warps of the others
// take pieces of rows: of every layer's dA, of dA_pool, and of several layers' dB_pool.
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
  // dB_pool's rows stand where dA_pool's do, behind all layers' own.
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
