// Small tables, such as arrays of pointers, that reach the device as kernel parameters.
//
// A launch takes its parameters by value, and so does a launch that is captured into a graph: every
// replay writes the table again from the graph's own copy. A copy from host memory would read that
// memory at every replay, when it may hold something else.
#pragma once

#include "heuristics.cuh"

namespace rasa_ext {

// As many words as fit in the 4096 bytes that kernel parameters may take on every device.
constexpr int kTableWords = 510;

struct TableParams {
  uint64_t* to;  // (count,), written
  int64_t count;
  uint64_t words[kTableWords];
};
static_assert(sizeof(TableParams) <= 4096, "kernel parameters");

// to[i] = words[i] for i < count, by one block. A grid constant can be indexed without a copy;
// other parameters might be copied to local memory for that.
__global__ void __launch_bounds__(kTableThreads)
    write_table_kernel(const __grid_constant__ TableParams params) {
  for (int i = threadIdx.x; i < params.count; i += kTableThreads) params.to[i] = params.words[i];
}

}  // namespace rasa_ext
