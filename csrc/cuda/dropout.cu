// Launchers of dropout.cuh.
#include "dropout.cuh"

#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "launchers.h"
#include "switches.cuh"

namespace rasa_ext {
namespace {

unsigned blocks_for(int64_t n) {
  return ceil_div(dropout_mask_bytes(n), int64_t{kStreamThreads} * kDropoutBytes);
}

}  // namespace

void launch_dropout(const uint64_t* noise, uint8_t* mask, int64_t n, double p, Stream stream) {
  if (n == 0) return;
  // A threshold of 2^16 would drop everything.
  const double threshold = std::min(std::nearbyint(p * 65536.0), 65535.0);
  RASA_LAUNCH(dropout_kernel, blocks_for(n), kStreamThreads, 0, stream, noise, mask, n,
              static_cast<uint32_t>(threshold));
}

void launch_keep(const void* x, const uint8_t* mask, void* x_dropped, int64_t n, DType dtype,
                 Stream stream) {
  if (n == 0) return;
  with_type(dtype, [&](auto t) {
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((keep_kernel<T>), blocks_for(n), kStreamThreads, 0, stream,
                static_cast<const T*>(x), mask, static_cast<T*>(x_dropped), n);
  });
}

}  // namespace rasa_ext
