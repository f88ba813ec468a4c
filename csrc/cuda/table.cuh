// Small tables, such as arrays of pointers, brought to the device as parameters of a kernel.
//
// A launch takes its parameters by value, and so does a launch that is captured into a graph: every
// replay writes the table again, out of the graph itself. A copy from host memory would read that
// memory at every replay, when it has long become something else.
#pragma once

#include "heuristics.cuh"

namespace rasa_ext {

// As many words as fit the 4096 bytes that the parameters of a kernel may take everywhere.
constexpr int kTableWords = 510;

struct TableParams {
  uint64_t* to;  // (count,), written
  int64_t count;
  uint64_t words[kTableWords];
};
static_assert(sizeof(TableParams) <= 4096, "kernel parameters");

// to[i] = words[i] for i < count, by one block. A grid constant is read where it lies, at any
// index; other parameters might be copied to local memory for it.
__global__ void __launch_bounds__(kTableThreads)
    write_table_kernel(const __grid_constant__ TableParams params) {
  for (int i = threadIdx.x; i < params.count; i += kTableThreads) params.to[i] = params.words[i];
}

}  // namespace rasa_ext
