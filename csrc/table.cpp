// Tables that the device reads, and why they are safe under graph capture.
//
// The words travel as kernel parameters. A captured graph stores parameters by value, so the host
// memory need not outlive the call or stay unchanged. The device memory comes from torch's
// allocator. During capture that is the graph's own pool, in which a later operator of the graph
// may reuse a freed address. Every replay runs the same kernels in the same order, so a table is
// always written before it is read.
//
// The addresses in a table must stay valid as long as the graph is replayed. Parameters and weights
// stay valid if the model is not moved or reallocated. Results and workspaces belong to the graph's
// pool.
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
