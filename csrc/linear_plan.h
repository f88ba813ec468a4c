// The products of the low-rank linear and of its backward, in order. No torch and no CUDA here.
//
// M tokens, `in` and `out` features, Rp the padded rank:
//
//     U = X Ap^T      Y   = U Bp + C         Y   += X W^T
//     H = G Bp^T      dBp = U^T G            dAp  = H^T X      dX = H Ap      dX += G W
//
// C is the bias, or the base's output in place of X W^T, or nothing.
//
// With dropout the X beside Ap is what the mask leaves of it, its scale stands before the products
// that give U and H, and the mask is put on dX before the last product.
//
// The adapter comes first and the base last, with beta = 1: reading Y again hides in the large
// product, and Y is rounded once. The bias comes with the adapter's product, not with the base's:
// cuBLAS adds one best to a product that adds nothing else. In the backward each product follows
// one that has read the same: G is still in the cache for dBp, and dX for the base.
#pragma once

#include <vector>

#include "gemm.h"

namespace rasa_ext {

struct LinearForward {
  Matrix x;          // (M, in)
  Matrix x_dropped;  // (M, in): x, or what dropout leaves of it
  Matrix weight;     // (out, in), or no data
  Matrix Ap;         // (Rp, in)
  Matrix Bp;         // (Rp, out)
  Matrix U;          // (M, Rp), written
  Matrix C;          // (M, out), an addend (gemm.h); y itself adds to y; or no data
  Matrix y;          // (M, out), written
  double scale;      // of dropout
};

std::vector<GemmCall> plan_forward(const LinearForward& forward);

// Results without data are not computed.
struct LinearBackward {
  Matrix grad;       // (M, out)
  Matrix x_dropped;  // (M, in), for dAp: x, or what dropout leaves of it
  Matrix U;          // (M, Rp), for dBp
  Matrix Ap;         // (Rp, in)
  Matrix Bp;         // (Rp, out)
  Matrix H;          // (M, Rp), written; has data where dx or dAp has
  Matrix dx;         // (M, in), written
  Matrix dAp;        // (Rp, in), written
  Matrix dBp;        // (Rp, out), written
  double scale;      // of dropout
};

// All but the last.
std::vector<GemmCall> plan_backward(const LinearBackward& backward);

}  // namespace rasa_ext
