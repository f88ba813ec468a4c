// Tables that the device reads, and why that is safe under graph capture.
//
// Their words travel as kernel parameters, which a captured graph keeps by value, so no host memory
// has to outlive the call or stay as it is. Their device memory comes from torch's allocator: while
// a graph is captured that is the graph's own pool, where an address freed here may serve a later
// operator of the same graph. Every replay runs the same kernels in the same order, so a table is
// written before it is read, each time.
//
// What the words point to must stay where it is for as long as the graph is replayed: parameters
// and weights do as long as the model is not moved or reallocated, and results and workspaces are
// of the graph's pool themselves.
#include <stdexcept>

#include "device.h"
#include "launchers.h"
#include "tensors.h"

namespace rasa_ext {

torch::stable::Tensor Device::upload(const torch::stable::Tensor& like, const void* host,
                                     size_t bytes) const {
  if (bytes % sizeof(uint64_t) != 0) throw std::logic_error("tables are whole 8-byte words");
  torch::stable::Tensor result = empty_bytes(like, bytes);
  launch_write_table(host, result.data_ptr(), bytes / sizeof(uint64_t), stream_);
  check_launch("write_table");
  return result;
}

}  // namespace rasa_ext
