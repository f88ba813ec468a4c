// Choices of the host code: one function for each, with the reason.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "launchers.h"

namespace rasa_ext {

// Whether the decode kernels add the adapter to the base's output. With few tokens the only work is
// to read Ap and Bp once, and most of a GEMM's tile of 64 or more rows would be empty. Based on a
// count of bytes, not yet on a measurement.
inline bool use_decode(int64_t tokens, int64_t rank, DType dtype) {
  return tokens <= 16 && decode_fits(static_cast<int>(tokens), static_cast<int>(rank), dtype);
}

// Whether the kernels of cuda/skinny.cuh compute a linear's products with one narrow side, if they
// support the shapes. With fewer tokens they leave multiprocessors idle, and the launch that adds
// up their sums costs more than their reads save. Based on benchmarks/predict.py, not yet on a
// measurement. RASA_EXT_KERNELS=cublas in the environment turns them off. It is read at every call,
// so that one run can compare.
inline bool use_skinny(int64_t tokens) {
  const char* chosen = std::getenv("RASA_EXT_KERNELS");
  return tokens >= 1024 && (chosen == nullptr || std::strcmp(chosen, "cublas") != 0);
}

// Whether one product (rows, cols) leaves no multiprocessor idle. Several such products are better
// run one after the other than as a batch: cuBLAS has its best kernels for single products. Based
// on a count of 128 x 128 tiles, of which an H100 has room for 132, not yet on a measurement.
inline bool fills_device(int64_t rows, int64_t cols) {
  return ((rows + 127) / 128) * ((cols + 127) / 128) >= 132;
}

}  // namespace rasa_ext
