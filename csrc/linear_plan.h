// The products of the low-rank linear and of its backward, in order. No torch and no CUDA here.
//
// M tokens, `in` and `out` features, Rp the padded rank:
//
//     U = X Ap^T      Y  = U Bt^T (+ bias)      Y  += X W^T
//     H = G Bt        dX = H Ap                 dX += G W        dAp = H^T X     dBt = G^T U
//
// The adapter comes first and the base last, with beta = 1: reading Y again hides in the large
// product, and Y is rounded once.
#pragma once

#include <vector>

#include "gemm.h"

namespace rasa_ext {

struct LinearForward {
  Matrix x;       // (M, in)
  Matrix weight;  // (out, in), or no data: the base's output stands in y already
  Matrix Ap;      // (Rp, in)
  Matrix Bt;      // (out, Rp)
  Matrix U;       // (M, Rp), written
  Matrix y;       // (M, out), written
  bool y_is_set;  // whether y holds something to add to: a bias, or the base's output
};

std::vector<GemmCall> plan_forward(const LinearForward& forward);

struct LinearBackward {
  Matrix grad;    // (M, out)
  Matrix x;       // (M, in)
  Matrix weight;  // (out, in), or no data
  Matrix U;       // (M, Rp)
  Matrix Ap;      // (Rp, in)
  Matrix Bt;      // (out, Rp)
  Matrix H;       // (M, Rp), written
  Matrix dx;      // (M, in), written; no data where not needed
  Matrix dAp;     // (Rp, in), written; no data where not needed
  Matrix dBt;     // (out, Rp), written with dAp
};

std::vector<GemmCall> plan_backward(const LinearBackward& backward);

}  // namespace rasa_ext
