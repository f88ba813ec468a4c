// Choices that the host code makes, each a function with its reason.
#pragma once

#include <cstdint>

#include "launchers.h"

namespace rasa_ext {

// Whether the adapter is added to the base's output by the hand-written pair of kernels. With few
// tokens all there is to do is to read Ap and Bp once; of a product's tile of 64 or more rows most
// would be empty. By count of bytes, not yet by measurement.
inline bool use_decode(int64_t tokens, int64_t rank, DType dtype) {
  return tokens <= 16 && decode_fits(static_cast<int>(tokens), static_cast<int>(rank), dtype);
}

// Whether the base products of two projections of one shape, which read the same x, run as one
// batch. Worth it where one of them alone leaves multiprocessors idle: by count of tiles of 128 x
// 128, of which an H100 has room for 132, not yet by measurement.
inline bool batch_projections(int64_t tokens, int64_t out) {
  return ((tokens + 127) / 128) * ((out + 127) / 128) < 132;
}

}  // namespace rasa_ext
