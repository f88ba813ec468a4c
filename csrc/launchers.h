// The launchers of the hand-written kernels, which host code calls with raw pointers. Uses neither
// torch nor CUDA.
//
// Symbols: M tokens, `in`/`out` features, own = r - k private ranks, pooled = L*k pooled ranks,
// R = own + pooled, Rp >= R the padded rank (on a GPU a multiple of 16; any works). The shape
// follows each pointer. All arrays are dense and row-major, and no output overlaps another array
// unless stated. A pointer of a tensor without elements may be null.
//
// Pointers are device pointers unless stated otherwise. Launchers return at once, neither allocate
// nor wait, and are safe under graph capture. They leave launch errors to cudaGetLastError. Empty
// work (M = 0, no layers) launches nothing. Sums run in a fixed order: equal inputs with equal
// alignment give equal bits. 16-byte accesses are used if all rows are 16-byte aligned, so
// alignment affects only speed and the order of a sum.
//
// Dtypes: `param` is the dtype of A, A_pool, B, B_pool, d and their gradients, `dtype` the dtype of
// the computation. Each is float32, float16 or bfloat16; or both are float64, except in decode.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace rasa_ext {

using Stream = void*;  // a cudaStream_t

// ---- tables ----

// device[i] = host[i] for i < words. The words travel as kernel parameters, about 4 KB per launch.
// `host` is read before the call returns, also during graph capture.
void launch_write_table(const void* host,  // (words,) of 8 bytes
                        void* device,      // (words,), aligned to 8 bytes, written
                        size_t words, Stream stream);

// ---- pack of a group: layers of one shape that share a pool ----

// Up to this many layers travel as kernel parameters, which may take 4096 bytes. This covers a
// group of an 8B model. More layers need a table in device memory.
constexpr int kLayersByValue = 32;

struct PackLayer {
  const void* A;  // (own, in) param
  const void* B;  // (out, own) param
  const void* d;  // (own + pooled,) param; null means ones
};

struct PackGroup {
  const void* A_pool;  // (pooled, in) param
  const void* B_pool;  // (out, pooled) param
  void* Ap;            // (layers, Rp, in) dtype, written
  void* Bp;            // (layers, Rp, out) dtype, written
  int layers;          // at most 65535
  int in, out;
  int own, pooled;
  int Rp;
};

// Computes Ap = [A ; A_pool] and Bp = diag(d) [B | B_pool]^T of every layer, cast, with zeros from
// rank R to Rp, in one launch. `host` (layers,) is read before the call returns; `device` is the
// same table in device memory, or null for up to kLayersByValue layers.
void launch_pack(const PackGroup& group, const PackLayer* host, const PackLayer* device,
                 DType param, DType dtype, Stream stream);

struct PackBackwardLayer {
  const void* dAp;  // (Rp, in) accumulation(param): float32, or float64 if param is
  const void* dBp;  // (Rp, out) accumulation(param)
  const void* B;    // (out, own) param
  const void* d;    // (own + pooled,) param; null means ones
};

// Without dAp, in is 0. Without dBp, out is 0 and dd is null.
struct PackBackwardGroup {
  const void* B_pool;  // (out, pooled) param
  void* dA;            // (layers, own, in) param, written
  void* dA_pool;       // (pooled, in) param, written: summed over the layers in order
  void* dB;            // (layers, out, own) param, written
  void* dB_pool;       // (out, pooled) param, written: summed over the layers in order
  void* dd;            // (layers, own + pooled) param, written; null if it is not wanted
  int layers;
  int in, out;
  int own, pooled;
};

// Computes columns dB_j = d_j dBp_j and dd_j = <[B | B_pool]_j, dBp_j> for every rank j of every
// layer; dA and dA_pool are rows of dAp. Takes one launch, with tables as in launch_pack.
void launch_pack_backward(const PackBackwardGroup& group, const PackBackwardLayer* host,
                          const PackBackwardLayer* device, DType param, Stream stream);

// ---- decode: U = x Ap^T, y += U Bp, for few tokens ----

struct DecodeCall {
  const void* x;    // (M, in) dtype
  const void* Ap;   // (Rp, in) dtype
  const void* Bp;   // (Rp, out) dtype
  void* U;          // (M, Rp) dtype, written; null if it is not wanted
  void* y;          // (M, out) dtype, read and written: added in float32, rounded once
  void* workspace;  // decode_workspace(...) bytes
  int M, in, out, Rp;
};

// Whether decode supports the call: float32, float16 or bfloat16, M <= 16, and a rank for which a
// block's rows of U fit in shared memory. Otherwise cuBLAS computes the products.
bool decode_fits(int M, int Rp, DType dtype);

size_t decode_workspace(int M, int in, int Rp);

// Takes two launches. Expects decode_fits to be true.
void launch_decode(const DecodeCall& call, DType dtype, Stream stream);

// ---- skinny: products with one narrow side, from one read of the wide matrix ----

// S (M, N) is x or a gradient. keep(S) is S with the elements that `mask` drops set to 0, or all of
// S without a mask. Strides are distances between rows, in elements.
struct SkinnyCall {
  const void* S;  // (M, N) dtype
  int64_t S_stride;
  const uint8_t* mask;  // (dropout_mask_bytes(M * N),) of the elements of S row by row, or null
  // If P is given: D = scale * keep(S) P^T.
  const void* P;  // (Rp, N) dtype
  int64_t P_stride;
  void* D;  // (M, Rp) dtype, written
  int64_t D_stride;
  double scale;
  // If Q is given: C = Q^T keep(S).
  const void* Q;  // (M, Rp) dtype
  int64_t Q_stride;
  void* C;          // (Rp, N) float32, written
  void* workspace;  // skinny_workspace(...) bytes
  int M, N, Rp;
};

// Whether the kernels support the call: float16 or bfloat16, Rp of 16, 32, ... 160, nonzero M and
// N, 16-byte aligned rows, and with a mask (4-byte aligned) N a multiple of 32.
bool skinny_fits(const SkinnyCall& call, DType dtype);

size_t skinny_workspace(const SkinnyCall& call);

// Takes at most two launches, or three if P and Q are given with a mask or with more than 96 ranks.
// Expects skinny_fits to be true, and P or Q.
void launch_skinny(const SkinnyCall& call, DType dtype, Stream stream);

// ---- dropout: draw a mask of bits from Philox 4x32-10, and apply it ----

// Returns the bytes of a mask of n elements: bit e % 8 of byte e / 8 says whether element e is
// kept. Bits from n on have no meaning.
inline int64_t dropout_mask_bytes(int64_t n) { return (n + 7) / 8; }

// Draws the mask. Element e is kept if the 16-bit word e % 8 of Philox block offset + e / 8 under
// the key is at least p * 2^16, rounded.
void launch_dropout(const uint64_t* noise,  // (2,): key, offset
                    uint8_t* mask,          // (dropout_mask_bytes(n),), aligned to 4 bytes, written
                    int64_t n, double p, Stream stream);

// x_dropped = x for elements that the mask keeps, and 0 for all others, even NaN. x_dropped may be
// x.
void launch_keep(const void* x,        // (n,) dtype
                 const uint8_t* mask,  // (dropout_mask_bytes(n),)
                 void* x_dropped,      // (n,) dtype, written
                 int64_t n, DType dtype, Stream stream);

}  // namespace rasa_ext
