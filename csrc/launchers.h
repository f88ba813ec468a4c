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
// equal inputs give equal bits. 16-byte accesses are used where addresses allow, so alignment is
// a matter of speed alone.
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

// ---- pack: Ap = [A ; A_pool], Bt = [B | B_pool] diag(d), cast, zero from R to Rp ----

struct PackLayer {
  const void* A;       // (own, in) param
  const void* A_pool;  // (pooled, in) param
  const void* B;       // (out, own) param
  const void* B_pool;  // (out, pooled) param
  const void* d;       // (own + pooled,) param
  void* Ap;            // (Rp, in) dtype, written
  void* Bt;            // (out, Rp) dtype, written
  int in, out;
  int own, pooled;
  int Rp;
  int reserved;  // 0
};

// The layer is passed by value: no table.
void launch_pack(const PackLayer& layer, DType param, DType dtype, Stream stream);

// `count` layers of any shapes, at most 65535, in one launch. `host` and `device` are the same
// table in host and in device memory; the host's is read before the call returns.
void launch_pack_layers(const PackLayer* host, const PackLayer* device, int count, DType param,
                        DType dtype, Stream stream);

// ---- pack_backward: with T = dBt, dB = T diag(d), dd_j = sum_n [B | B_pool][n, j] T[n, j],
// ---- dA and dA_pool rows of dAp ----

struct PackBackwardLayer {
  const void* dAp;     // (Rp, in) accumulation(param): float32, or float64 where param is
  const void* dBt;     // (Rp, out) accumulation(param): dBt (out, Rp) by columns
  const void* B;       // (out, own) param
  const void* B_pool;  // (out, pooled) param
  const void* d;       // (own + pooled,) param
  void* dA;            // (own, in) param, written
  void* dB;            // (out, own) param, written
  void* dd;            // (own + pooled,) param, written
  int in, out;
  int own, pooled;
};

// The pool's gradients.
struct PoolGrads {
  void* dA_pool;  // (pooled, in) param, written
  void* dB_pool;  // (pooled, out) param, written: dB_pool (out, pooled) by columns
};

// What the launchers below need as workspace: uninitialised device memory, aligned to 16 bytes,
// free again when the work is done. 0 is possible, and then the workspace may be null.
size_t pack_backward_workspace(int count, int out, int own, int pooled, DType param);

void launch_pack_backward(const PackBackwardLayer& layer, const PoolGrads& pool, void* workspace,
                          DType param, Stream stream);

// The `count` layers of one group, at most 65535, all of the shape of host[0], whose pooled is at
// most 65535; the pool's gradients are summed over the layers in the order of the table. Tables as
// for launch_pack_layers.
void launch_pack_layers_backward(const PackBackwardLayer* host, const PackBackwardLayer* device,
                                 int count, const PoolGrads& pool, void* workspace, DType param,
                                 Stream stream);

// ---- decode: U = x Ap^T, y += U Bt^T, for few tokens ----

struct DecodeCall {
  const void* x;    // (M, in) dtype
  const void* Ap;   // (Rp, in) dtype
  const void* Bt;   // (out, Rp) dtype
  void* U;          // (M, Rp) dtype, written; null where it is not wanted
  void* y;          // (M, out) dtype, added to: read, added in float32, rounded once
  void* workspace;  // decode_workspace(...) bytes
  int M, in, out, Rp;
};

// Whether decode takes the call: float32, float16 or bfloat16, M <= 16, and a rank of which a
// block's rows of U fit in shared memory. Otherwise the products are cuBLAS's.
bool decode_fits(int M, int Rp, DType dtype);

size_t decode_workspace(int M, int in, int Rp);

// Expects decode_fits.
void launch_decode(const DecodeCall& call, DType dtype, Stream stream);

// ---- dropout: a mask of bits from Philox 4x32-10, and what it leaves ----

// Bytes of a mask of n elements: bit e % 8 of byte e / 8 says whether e is kept. Bits from n on
// mean nothing.
inline int64_t dropout_mask_bytes(int64_t n) { return (n + 7) / 8; }

// Element e is kept where the 16-bit word e % 8 of Philox block offset + e / 8 under the key is at
// least p * 2^16, rounded.
void launch_dropout_mask(const uint64_t* noise,  // (2,): key, offset
                         uint8_t* mask,          // (dropout_mask_bytes(n),), written
                         int64_t n, double p, Stream stream);

// kept = x where the mask says so, else 0 whatever x is. kept may be x.
void launch_dropout(const void* x,        // (n,) dtype
                    const uint8_t* mask,  // (dropout_mask_bytes(n),)
                    void* kept,           // (n,) dtype, written
                    int64_t n, DType dtype, Stream stream);

}  // namespace rasa_ext
