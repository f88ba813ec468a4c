// The device of an operator's tensors, and torch's current stream on it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>

#include "blas.h"

namespace rasa_ext {

// Makes the tensor's device current while the object lives.
class [[gnu::visibility("hidden")]] Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Returns a cudaStream_t.
  void* stream() const { return stream_; }

  // Returns torch's cuBLAS handle, on that stream.
  Blas blas() const;

  // Copies a small table of whole 8-byte words from host memory to the device, in stream order.
  // Does not wait, and is safe under graph capture (table.cpp). `host` may change right after the
  // call.
  torch::stable::Tensor upload(const torch::stable::Tensor& like, const void* host,
                               size_t bytes) const;

  // Throws if the launch before this call failed. The message names `kernel`.
  void check_launch(const char* kernel) const;

 private:
  torch::stable::Tensor tensor_;
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace rasa_ext
