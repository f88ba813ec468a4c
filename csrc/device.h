// Where one operator runs: the device of its tensors, and torch's current stream there.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>

#include "blas.h"

namespace rasa_ext {

// Makes the tensor's device current for its own lifetime.
class [[gnu::visibility("hidden")]] Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // A cudaStream_t.
  void* stream() const { return stream_; }

  // What products run on: torch's cuBLAS handle, on that stream.
  Blas blas() const;

  // A small table of host memory, whole 8-byte words, on the device: in the order of the stream,
  // waited for by nobody, and safe under graph capture (table.cpp). `host` may change at once.
  torch::stable::Tensor upload(const torch::stable::Tensor& like, const void* host,
                               size_t bytes) const;

  // Throws if the launch before it failed; `kernel` names it.
  void check_launch(const char* kernel) const;

 private:
  torch::stable::Tensor tensor_;
  void* guard_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace rasa_ext
