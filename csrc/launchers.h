// The hand-written kernels as raw pointers: what host code calls. No torch and no CUDA here.
//
// Symbols: M tokens, `in`/`out` features, own = r - k private ranks, pooled = L*k pooled ranks,
// R = own + pooled, Rp >= R the padded rank (on a GPU a multiple of 16; any works). Shapes stand
// after the pointers; everything is dense, one row after the other, and no output overlaps
// anything unless it says so. A pointer of a tensor without elements may be null.
//
// Pointers are device pointers unless they say otherwise. Launchers return at once, allocate
// nothing, wait for nothing and are safe under graph capture; errors of a launch are left to
// cudaGetLastError. Work over nothing (M = 0, no layers) launches nothing. Sums run in fixed order:
// equal inputs that lie alike give equal bits. 16-byte accesses are used where all rows begin at 16
// bytes, so alignment is a matter of speed, and of the order of a sum.
//
// Every rank is a row: B (own, out) and B_pool (pooled, out) here are what users see transposed.
//
// Dtypes: `param` of A, A_pool, B, B_pool, d and of their gradients, `dtype` of what is computed
// in. Both are any of float32, float16 and bfloat16; or both are float64, except in decode.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace rasa_ext {

using Stream = void*;  // a cudaStream_t

// ---- tables ----

// device[i] = host[i] for i < words. The words travel as kernel parameters, about 4 KB to a launch:
// the host's are read before the call returns, also while a graph is captured.
void launch_write_table(const void* host,  // (words,) of 8 bytes
                        void* device,      // (words,), aligned to 8 bytes, written
                        size_t words, Stream stream);

// ---- pack, of a group: layers of one shape with one pool ----

// Up to so many layers travel as parameters of the kernel, which may take 4096 bytes: those of a
// group of an 8B model. More need a table in device memory.
constexpr int kLayersByValue = 32;

struct PackLayer {
  const void* A;  // (own, in) param
  const void* B;  // (own, out) param
  const void* d;  // (own + pooled,) param; null stands for ones
};

struct PackGroup {
  const void* A_pool;  // (pooled, in) param
  const void* B_pool;  // (pooled, out) param
  void* Ap;            // (layers, Rp, in) dtype, written
  void* Bp;            // (layers, Rp, out) dtype, written
  int layers;          // at most 65535
  int in, out;
  int own, pooled;
  int Rp;
};

// For every layer Ap = [A ; A_pool] and Bp = diag(d) [B ; B_pool], cast, zero from R to Rp; in one
// launch. `host` (layers,) is read before the call returns; `device` is the same table in device
// memory, null up to kLayersByValue layers.
void launch_pack(const PackGroup& group, const PackLayer* host, const PackLayer* device,
                 DType param, DType dtype, Stream stream);

struct PackBackwardLayer {
  const void* dAp;  // (Rp, in) accumulation(param): float32, or float64 where param is
  const void* dBp;  // (Rp, out) accumulation(param)
  const void* B;    // (own, out) param
  const void* d;    // (own + pooled,) param; null stands for ones
};

// Where dAp is not given, in is 0; where dBp is not, out is 0 and dd null.
struct PackBackwardGroup {
  const void* B_pool;  // (pooled, out) param
  void* dA;            // (layers, own, in) param, written
  void* dA_pool;       // (pooled, in) param, written: summed over the layers, in their order
  void* dB;            // (layers, own, out) param, written
  void* dB_pool;       // (pooled, out) param, written: summed likewise
  void* dd;            // (layers, own + pooled) param, written; null where it is not wanted
  int layers;
  int in, out;
  int own, pooled;
};

// For every row j of every layer dB_j = d_j dBp_j and dd_j = <[B ; B_pool]_j, dBp_j>; dA and
// dA_pool are rows of dAp. In one launch, with tables as for launch_pack.
void launch_pack_backward(const PackBackwardGroup& group, const PackBackwardLayer* host,
                          const PackBackwardLayer* device, DType param, Stream stream);

// ---- decode: U = x Ap^T, y += U Bp, for few tokens ----

struct DecodeCall {
  const void* x;    // (M, in) dtype
  const void* Ap;   // (Rp, in) dtype
  const void* Bp;   // (Rp, out) dtype
  void* U;          // (M, Rp) dtype, written; null where it is not wanted
  void* y;          // (M, out) dtype, added to: read, added in float32, rounded once
  void* workspace;  // decode_workspace(...) bytes
  int M, in, out, Rp;
};

// Whether decode takes the call: float32, float16 or bfloat16, M <= 16, and a rank of which a
// block's rows of U fit in shared memory. Otherwise the products are cuBLAS's.
bool decode_fits(int M, int Rp, DType dtype);

size_t decode_workspace(int M, int in, int Rp);

// In two launches. Expects decode_fits.
void launch_decode(const DecodeCall& call, DType dtype, Stream stream);

// ---- skinny: products with one narrow side, from one read of the wide matrix ----

// S (M, N) is x or a gradient, and keep(S) what `mask` leaves of it, all of it without one. The
// strides are distances between rows, in elements.
struct SkinnyCall {
  const void* S;  // (M, N) dtype
  int64_t S_stride;
  const uint8_t* mask;  // (dropout_mask_bytes(M * N),) of S's elements row by row, or null
  // Where P is given: D = scale * keep(S) P^T.
  const void* P;  // (Rp, N) dtype
  int64_t P_stride;
  void* D;  // (M, Rp) dtype, written
  int64_t D_stride;
  double scale;
  // Where Q is given: C = Q^T keep(S).
  const void* Q;  // (M, Rp) dtype
  int64_t Q_stride;
  void* C;          // (Rp, N) float32, written
  void* workspace;  // skinny_workspace(...) bytes
  int M, N, Rp;
};

// Whether the kernels take the call: float16 or bfloat16, Rp of 16, 32, ... 160, M and N not zero,
// rows that begin at 16 bytes, and with a mask N a multiple of 32.
bool skinny_fits(const SkinnyCall& call, DType dtype);

size_t skinny_workspace(const SkinnyCall& call);

// In two launches; in three where both are wanted with a mask or with more than 96 ranks. Expects
// skinny_fits, and P or Q.
void launch_skinny(const SkinnyCall& call, DType dtype, Stream stream);

// ---- dropout: a mask of bits from Philox 4x32-10, and what it leaves ----

// Bytes of a mask of n elements: bit e % 8 of byte e / 8 says whether e is kept. Bits from n on
// mean nothing.
inline int64_t dropout_mask_bytes(int64_t n) { return (n + 7) / 8; }

// Draws the mask: element e is kept where the 16-bit word e % 8 of Philox block offset + e / 8
// under the key is at least p * 2^16, rounded.
void launch_dropout(const uint64_t* noise,  // (2,): key, offset
                    uint8_t* mask,          // (dropout_mask_bytes(n),), aligned to 4 bytes, written
                    int64_t n, double p, Stream stream);

// x_dropped = x where the mask says so, else 0 whatever x is. x_dropped may be x.
void launch_keep(const void* x,        // (n,) dtype
                 const uint8_t* mask,  // (dropout_mask_bytes(n),)
                 void* x_dropped,      // (n,) dtype, written
                 int64_t n, DType dtype, Stream stream);

}  // namespace rasa_ext
