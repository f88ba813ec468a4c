// Launchers of dropout.cuh.
#include "dropout.cuh"

#include <algorithm>
#include <cmath>

#include "launchers.h"
#include "switches.cuh"

namespace rasa_ext {
namespace {

template <typename W>
DropoutParams<W> params_of(const DropoutDraw& draw, int64_t n) {
  // 2^32 itself does not fit; where p is that close to 1, the scale makes up for nothing.
  const double threshold = std::min(std::round(draw.p * 4294967296.0), 4294967295.0);
  const W scale = draw.p < 1 ? static_cast<W>(1 / (1 - draw.p)) : W(0);
  return {draw.seed_offset, n, static_cast<uint32_t>(threshold), scale};
}

unsigned blocks_for(int64_t n) {
  constexpr int64_t per_block = int64_t{kStreamThreads} * kDropoutElements;
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

}  // namespace

void launch_dropout(const void* x, void* x_drop, uint8_t* mask, int64_t n, const DropoutDraw& draw,
                    DType dtype, Stream stream) {
  if (n == 0) return;
  with_type(dtype, [&](auto t) {
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((dropout_kernel<T>), blocks_for(n), kStreamThreads, 0, stream,
                static_cast<const T*>(x), static_cast<T*>(x_drop), mask,
                params_of<Wide<T>>(draw, n));
  });
}

void launch_dropout_backward(const void* dx_drop, void* dx, const uint8_t* mask, int64_t n,
                             const DropoutDraw& draw, DType dtype, Stream stream) {
  if (n == 0) return;
  with_type(dtype, [&](auto t) {
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((dropout_backward_kernel<T>), blocks_for(n), kStreamThreads, 0, stream,
                static_cast<const T*>(dx_drop), static_cast<T*>(dx), mask,
                params_of<Wide<T>>(draw, n));
  });
}

}  // namespace rasa_ext
