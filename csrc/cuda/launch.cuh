// Helpers of the launchers.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rasa_ext {

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

// Whether rows of `row` elements, one after the other, are all 16-byte aligned.
inline bool at_16_bytes(const void* rows, int64_t row, DType dtype) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 &&
         row * static_cast<int64_t>(size_of(dtype)) % 16 == 0;
}

}  // namespace rasa_ext
