// The arrays' memory on a GPU: managed, so that the host can access it.
#include <cuda_runtime_api.h>

#include <string>

#include "arrays.h"

namespace check {
namespace {

void expect_success(cudaError_t status) {
  if (status != cudaSuccess) fail(std::string("CUDA: ") + cudaGetErrorString(status));
}

}  // namespace

void* allocate(size_t bytes) {
  void* memory = nullptr;
  expect_success(cudaMallocManaged(&memory, bytes + 1));
  return memory;
}

void release(void* memory) { cudaFree(memory); }

void finish() {
  expect_success(cudaGetLastError());
  expect_success(cudaDeviceSynchronize());
}

// A GPU chooses its own schedule.
void set_schedule(uint64_t) {}

}  // namespace check
