// Launchers of dropout.cuh.
#include "dropout.cuh"

#include <algorithm>
#include <cmath>

#include "launchers.h"
#include "switches.cuh"

namespace rasa_ext {
namespace {

unsigned blocks_for(int64_t bytes) {
  return static_cast<unsigned>((bytes + kStreamThreads - 1) / kStreamThreads);
}

}  // namespace

void launch_dropout_mask(const uint64_t* noise, uint8_t* mask, int64_t n, double p, Stream stream) {
  if (n == 0) return;
  // 2^16 itself would drop everything.
  const double threshold = std::min(std::nearbyint(p * 65536.0), 65535.0);
  const int64_t bytes = dropout_mask_bytes(n);
  RASA_LAUNCH(dropout_mask_kernel, blocks_for(bytes), kStreamThreads, 0, stream, noise, mask, bytes,
              static_cast<uint32_t>(threshold));
}

void launch_dropout(const void* x, const uint8_t* mask, void* kept, int64_t n, DType dtype,
                    Stream stream) {
  if (n == 0) return;
  const unsigned blocks = blocks_for(dropout_mask_bytes(n));
  with_type(dtype, [&](auto t) {
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((dropout_kernel<T>), blocks, kStreamThreads, 0, stream, static_cast<const T*>(x),
                mask, static_cast<T*>(kept), n);
  });
}

}  // namespace rasa_ext
