// The element types that the kernels compute in.
#pragma once

#include <cstddef>

namespace rasa_ext {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// Returns the dtype of sums and of weight gradients.
inline DType accumulation(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace rasa_ext
