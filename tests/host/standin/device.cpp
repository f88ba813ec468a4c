// The CPU as a device. Allocated memory is filled with NaN, so that tests see reads of it.
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

namespace rasa_ext {

Device::Device(const torch::stable::Tensor& tensor) : tensor_(tensor) {}
Device::~Device() = default;
Blas Device::blas() const { return {nullptr, nullptr, tensor_}; }
void Device::check_launch(const char*) const {}

}  // namespace rasa_ext

extern "C" AOTITorchError __real_aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes,
                                                          const int64_t* strides, int32_t dtype,
                                                          int32_t device_type, int32_t device_index,
                                                          AtenTensorHandle* made);

// The linker redirects the library's allocations to this function.
extern "C" AOTITorchError __wrap_aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes,
                                                          const int64_t* strides, int32_t dtype,
                                                          int32_t device_type, int32_t device_index,
                                                          AtenTensorHandle* made) {
  const AOTITorchError error =
      __real_aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type, device_index, made);
  void* data = nullptr;
  int64_t bytes = 0;
  if (error == 0 && aoti_torch_get_data_ptr(*made, &data) == 0 &&
      aoti_torch_get_storage_size(*made, &bytes) == 0 && bytes > 0) {
    std::memset(data, 0xff, static_cast<size_t>(bytes));
  }
  return error;
}
