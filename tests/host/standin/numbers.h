// Reading and writing single elements of any dtype on the CPU.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "half_types.h"

namespace rasa_ext {

inline double load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kBFloat16:
      return as_float(static_cast<const emulation::bfloat16*>(data)[i]);
    default:
      return as_float(static_cast<const emulation::float16*>(data)[i]);
  }
}

inline void store(void* data, DType dtype, int64_t i, double value) {
  const auto narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(data)[i] = narrow;
      break;
    case DType::kBFloat16:
      static_cast<emulation::bfloat16*>(data)[i] = emulation::as_bfloat16(narrow);
      break;
    default:
      static_cast<emulation::float16*>(data)[i] = emulation::as_float16(narrow);
  }
}

}  // namespace rasa_ext
