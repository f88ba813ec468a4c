// Choices that the host code makes, each a function with its reason.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "launchers.h"

namespace rasa_ext {

// Whether the adapter is added to the base's output by the hand-written pair of kernels. With few
// tokens all there is to do is to read Ap and Bp once; of a product's tile of 64 or more rows most
// would be empty. By count of bytes, not yet by measurement.
inline bool use_decode(int64_t tokens, int64_t rank, DType dtype) {
  return tokens <= 16 && decode_fits(static_cast<int>(tokens), static_cast<int>(rank), dtype);
}

// Whether a linear's products with one narrow side are the kernels' of cuda/skinny.cuh, where they
// take the shapes: with fewer tokens they leave multiprocessors idle, and the launch that adds up
// their sums costs more than their reads save. By benchmarks/predict.py, not yet by measurement.
// RASA_EXT_KERNELS=cublas in the environment says no, at any time, so that one run can compare.
inline bool use_skinny(int64_t tokens) {
  const char* chosen = std::getenv("RASA_EXT_KERNELS");
  return tokens >= 1024 && (chosen == nullptr || std::strcmp(chosen, "cublas") != 0);
}

// Whether one product (rows, cols) leaves no multiprocessor idle, so that several are better run
// one after the other than as a batch: cuBLAS has its best kernels for single products. By count of
// tiles of 128 x 128, of which an H100 has room for 132, not yet by measurement.
inline bool fills_device(int64_t rows, int64_t cols) {
  return ((rows + 127) / 128) * ((cols + 127) / 128) >= 132;
}

}  // namespace rasa_ext
