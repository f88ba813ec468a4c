// Choices that the host code makes, each a function with its reason.
#pragma once

#include <cstdint>

#include "launchers.h"

namespace rasa_ext {

// Whether the adapter is added to the base's output by the hand-written pair of kernels. With few
// tokens all there is to do is to read Ap and Bt once; of a product's tile of 64 or more rows most
// would be empty. By count of bytes, not yet by measurement.
inline bool use_decode(int64_t tokens, int64_t rank, DType dtype) {
  return tokens <= 16 && decode_fits(static_cast<int>(tokens), static_cast<int>(rank), dtype);
}

}  // namespace rasa_ext
