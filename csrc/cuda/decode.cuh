// decode: the low-rank product for few tokens, for which a launch costs as much as the work.
//
//     U = x Ap^T        y += U Bp
//
// The shrink kernel splits K = in into parts and writes each part's U to the workspace. Every block
// of the expand kernel adds up the parts of U, in order, and multiplies the sum with the block's
// columns of Bp. This sum stays in float32.
#pragma once

#include "collective.cuh"
#include "heuristics.cuh"
#include "launchers.h"

namespace rasa_ext {

struct DecodeParams {
  DecodeCall call;
  int splits, part;  // K is cut into `splits` parts of `part` elements, the last ones shorter
  bool whole_in;     // rows of x and Ap are 16-byte aligned
  bool whole_out;    // rows of Bp and y are 16-byte aligned
};

// sum[m][r] += x[m] . Ap[r] over this lane's share of [begin, end), `step` neighbouring elements at
// a time.
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
// and `tokens` tokens. Rows and tokens beyond the last repeat the last and are not written.
template <typename T, int tokens>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    shrink_kernel(const __grid_constant__ DecodeParams params) {
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

// y[m, n] += sum_j U[j, m] Bp[j, n] for this thread's `step` neighbouring columns n.
template <int step, int tokens, typename T>
__device__ __forceinline__ void add_product(const float* U,  // (Rp, tokens)
                                            const T* Bp,     // (Rp, out)
                                            T* y,            // (live, out)
                                            int Rp, int out, int live) {
  const int n = (blockIdx.x * kDecodeThreads + threadIdx.x) * step;
  if (n >= out) return;
  float sum[tokens][step] = {};
  for (int j = 0; j < Rp; j += kExpandRows) {
    Vector<T, step> rows[kExpandRows];
#pragma unroll
    for (int r = 0; r < kExpandRows; ++r) {
      if (j + r < Rp) rows[r] = load<step>(Bp + int64_t{j + r} * out + n);
    }
#pragma unroll
    for (int r = 0; r < kExpandRows; ++r) {
      if (j + r >= Rp) break;
      const Vector<float, tokens> u = load<tokens>(U + (j + r) * tokens);
#pragma unroll
      for (int m = 0; m < tokens; ++m) {
#pragma unroll
        for (int v = 0; v < step; ++v) sum[m][v] += u.at[m] * widen(rows[r].at[v]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < tokens; ++m) {
    if (m >= live) break;
    T* to = y + int64_t{m} * out + n;
    Vector<T, step> result = load<step>(to);
#pragma unroll
    for (int v = 0; v < step; ++v) result.at[v] = narrow<T>(widen(result.at[v]) + sum[m][v]);
    store(to, result);
  }
}

// y += (sum_s partial[s]) Bp for `tokens` tokens. Tokens beyond the last count as zero. A thread
// takes neighbouring columns.
template <typename T, int tokens>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks)
    expand_kernel(const __grid_constant__ DecodeParams params) {
  RASA_SHARED(float, U);  // (Rp, tokens)
  const DecodeCall& call = params.call;
  const int token = blockIdx.y * tokens, live = min(tokens, call.M - token);
  const int Rp = call.Rp, out = call.out;
  const float* partial = static_cast<const float*>(call.workspace);  // (splits, M, Rp)
  T* U_out = static_cast<T*>(call.U);                                // (M, Rp)
  for (int i = threadIdx.x; i < tokens * Rp; i += kDecodeThreads) {
    const int m = i % tokens;
    const int64_t at = int64_t{token + m} * Rp + i / tokens;
    float sum = 0;
    if (m < live) {
#pragma unroll 8
      for (int s = 0; s < params.splits; ++s) sum += partial[s * int64_t{call.M} * Rp + at];
      if (U_out != nullptr && blockIdx.x == 0) U_out[at] = narrow<T>(sum);
    }
    U[i] = sum;
  }
  __syncthreads();
  const T* Bp = static_cast<const T*>(call.Bp);           // (Rp, out)
  T* y = static_cast<T*>(call.y) + int64_t{token} * out;  // (live, out)
  if (params.whole_out) {
    add_product<kExpandStep, tokens>(U, Bp, y, Rp, out, live);
  } else {
    add_product<1, tokens>(U, Bp, y, Rp, out, live);
  }
}

}  // namespace rasa_ext
