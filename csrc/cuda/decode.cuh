// decode: the low-rank product for few tokens, where a launch costs as much as the work.
//
//     U = x Ap^T        y += U Bt^T
//
// The shrink cuts K = in into parts and leaves each part's U in the workspace; every block of the
// expand adds the parts up, in order, and multiplies with its rows of Bt. U is never rounded.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "launchers.h"

namespace rasa_ext {

struct DecodeParams {
  DecodeCall call;
  int splits, part;  // K is cut into `splits` parts of `part` elements, the last ones shorter
  bool whole_in;     // rows of x and Ap begin and end at 16 bytes
  bool whole_rank;   // rows of Bt do
};
static_assert(sizeof(DecodeParams) <= 4096, "kernel parameters");

// sum[m][r] += x[m] . Ap[r] over [begin, end), this lane's share. `step` neighbours at a time.
template <int step, int tokens, typename T>
__device__ __forceinline__ void dot_rows(const T* const (&x)[tokens],
                                         const T* const (&Ap)[kShrinkRows], int begin, int end,
                                         float (&sum)[tokens][kShrinkRows]) {
  const int lane = threadIdx.x % kWarp;
  for (int k = begin + lane * step; k < end; k += kWarp * step) {
    Vector<T, step> a[kShrinkRows];
#pragma unroll
    for (int r = 0; r < kShrinkRows; ++r) a[r] = load<step>(Ap[r] + k);
#pragma unroll
    for (int m = 0; m < tokens; ++m) {
      const Vector<T, step> b = load<step>(x[m] + k);
#pragma unroll
      for (int r = 0; r < kShrinkRows; ++r) {
#pragma unroll
        for (int v = 0; v < step; ++v) sum[m][r] += widen(b.at[v]) * widen(a[r].at[v]);
      }
    }
  }
}

// partial[s] = x[:, part s] Ap[:, part s]^T. A warp takes kShrinkRows rows of Ap, part blockIdx.y
// and `tokens` tokens; rows and tokens beyond the last are computed as the last, and not written.
template <typename T, int tokens>
__global__ void __launch_bounds__(kDecodeThreads) shrink_kernel(DecodeParams params) {
  const DecodeCall& call = params.call;
  const T* x = static_cast<const T*>(call.x);            // (M, in)
  const T* Ap = static_cast<const T*>(call.Ap);          // (Rp, in)
  float* partial = static_cast<float*>(call.workspace);  // (splits, M, Rp)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = (blockIdx.x * (kDecodeThreads / kWarp) + warp) * kShrinkRows;
  const int token = blockIdx.z * tokens;

  const T* x_rows[tokens];
  const T* Ap_rows[kShrinkRows];
#pragma unroll
  for (int m = 0; m < tokens; ++m) {
    x_rows[m] = x + static_cast<int64_t>(min(token + m, call.M - 1)) * call.in;
  }
#pragma unroll
  for (int r = 0; r < kShrinkRows; ++r) {
    Ap_rows[r] = Ap + static_cast<int64_t>(min(row + r, call.Rp - 1)) * call.in;
  }
  const int begin = min(static_cast<int>(blockIdx.y) * params.part, call.in);
  const int end = min(begin + params.part, call.in);
  float sum[tokens][kShrinkRows] = {};
  if (params.whole_in) {
    dot_rows<kPer16Bytes<T>>(x_rows, Ap_rows, begin, end, sum);
  } else {
    dot_rows<1>(x_rows, Ap_rows, begin, end, sum);
  }
#pragma unroll
  for (int m = 0; m < tokens; ++m) {
#pragma unroll
    for (int r = 0; r < kShrinkRows; ++r) {
      const float all = sum_over_lanes<kWarp>(sum[m][r]);
      if (lane == 0 && token + m < call.M && row + r < call.Rp) {
        partial[(static_cast<int64_t>(blockIdx.y) * call.M + token + m) * call.Rp + row + r] = all;
      }
    }
  }
}

// sum[m] += U[m] . Bt_row, this lane's share of every kExpandLanes; `step` neighbours at a time.
template <int step, int tokens, typename T>
__device__ __forceinline__ void dot_tokens(const float* U,   // (tokens, Rp)
                                           const T* Bt_row,  // (Rp,)
                                           int Rp, int live, float (&sum)[tokens]) {
  const int part = threadIdx.x % kExpandLanes;
  for (int j = part * step; j < Rp; j += kExpandLanes * step) {
    const Vector<T, step> b = load<step>(Bt_row + j);
#pragma unroll
    for (int m = 0; m < tokens; ++m) {
      if (m >= live) continue;
      const Vector<float, step> u = load<step>(U + m * Rp + j);
#pragma unroll
      for (int v = 0; v < step; ++v) sum[m] += u.at[v] * widen(b.at[v]);
    }
  }
}

// y += (sum_s partial[s]) Bt^T for `tokens` tokens; kExpandLanes lanes share a row of Bt.
template <typename T, int tokens>
__global__ void __launch_bounds__(kDecodeThreads) expand_kernel(DecodeParams params) {
  RASA_SHARED(float, U);  // (tokens, Rp)
  const DecodeCall& call = params.call;
  const float* partial = static_cast<const float*>(call.workspace);  // (splits, M, Rp)
  const T* Bt = static_cast<const T*>(call.Bt);                      // (out, Rp)
  T* U_out = static_cast<T*>(call.U);                                // (M, Rp)
  T* y = static_cast<T*>(call.y);                                    // (M, out)
  const int token = blockIdx.y * tokens, live = min(tokens, call.M - token);
  const int row = blockIdx.x * (kDecodeThreads / kExpandLanes) + threadIdx.x / kExpandLanes;
  const int part = threadIdx.x % kExpandLanes;

  for (int m = 0; m < live; ++m) {
    for (int j = threadIdx.x; j < call.Rp; j += kDecodeThreads) {
      const int64_t at = static_cast<int64_t>(token + m) * call.Rp + j;
      const int64_t part_size = static_cast<int64_t>(call.M) * call.Rp;
      float sum = 0;
#pragma unroll 4
      for (int s = 0; s < params.splits; ++s) sum += partial[s * part_size + at];
      U[m * call.Rp + j] = sum;
      if (U_out != nullptr && blockIdx.x == 0) U_out[at] = narrow<T>(sum);
    }
  }
  __syncthreads();
  if (call.out == 0) return;

  // Lanes beyond the last row compute it again: all 32 take part in the sum over lanes.
  const T* Bt_row = Bt + static_cast<int64_t>(min(row, call.out - 1)) * call.Rp;
  float sum[tokens] = {};
  if (params.whole_rank) {
    dot_tokens<kPer16Bytes<T>>(U, Bt_row, call.Rp, live, sum);
  } else {
    dot_tokens<1>(U, Bt_row, call.Rp, live, sum);
  }
#pragma unroll
  for (int m = 0; m < tokens; ++m) {
    const float all = sum_over_lanes<kExpandLanes>(sum[m]);
    if (m < live && row < call.out && part == m % kExpandLanes) {
      T* to = y + static_cast<int64_t>(token + m) * call.out + row;
      *to = narrow<T>(widen(*to) + all);
    }
  }
}

}  // namespace rasa_ext
