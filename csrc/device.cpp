#include "device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

namespace rasa_ext {

Device::Device(const torch::stable::Tensor& tensor) : tensor_(tensor) {
  if (!tensor.is_cuda()) {
    throw std::runtime_error("rasa_ext: expected tensors on a CUDA device, got one elsewhere.");
  }
  const int32_t index = tensor.get_device_index();
  DeviceGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index, &guard));
  guard_ = guard;
  if (aoti_torch_get_current_cuda_stream(index, &stream_) != TORCH_SUCCESS) {
    aoti_torch_delete_device_guard(guard);
    throw std::runtime_error("rasa_ext: torch gave no stream for device " + std::to_string(index));
  }
}

Device::~Device() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

Blas Device::blas() const {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return {handle, stream_, tensor_};
}

void Device::check_launch(const char* kernel) const {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error("rasa_ext: " + std::string(kernel) + ": expected a launch, got " +
                             cudaGetErrorString(status));
  }
}

}  // namespace rasa_ext
