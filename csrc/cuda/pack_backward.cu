// Launcher of pack_backward.cuh.
#include "pack_backward.cuh"

#include <algorithm>

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {
namespace {

// The part of a group, but for where its layers begin, and the blocks that it wants.
PackBackwardPart part_of(const PackBackwardGroup& group, const PackBackwardLayer* layers,
                         DType param) {
  const DType wide = accumulation(param);
  PackBackwardPart part{group, 0, 0, false, false};
  part.whole_in = at_16_bytes(group.dA_pool, group.in, param);
  part.whole_out =
      at_16_bytes(group.B_pool, group.out, param) && at_16_bytes(group.dB_pool, group.out, param);
  bool dots = false;
  for (int i = 0; i < group.count; ++i) {
    const PackBackwardLayer& layer = layers[i];
    part.whole_in = part.whole_in && at_16_bytes(layer.dAp, group.in, wide) &&
                    at_16_bytes(layer.dA, group.in, param);
    part.whole_out = part.whole_out && at_16_bytes(layer.dBp, group.out, wide) &&
                     at_16_bytes(layer.B, group.out, param) &&
                     at_16_bytes(layer.dB, group.out, param);
    dots = dots || group.out > 0 || layer.dd != nullptr;
  }
  part.dots = dots ? group.count * (group.own + group.pooled) : 0;
  return part;
}

unsigned blocks_of(const PackBackwardPart& part) {
  const PackBackwardGroup& group = part.group;
  int64_t pieces = (int64_t{group.count} * group.own + group.pooled) * pieces_of(group.in);
  if (group.count > 1) pieces += int64_t{group.pooled} * pieces_of(group.out);
  return part.dots + ceil_div(pieces, kStreamThreads / kWarp);
}

}  // namespace

void launch_pack_backward(const PackBackwardGroup* first, int groups, const PackBackwardLayer* host,
                          const PackBackwardLayer* device, DType param, Stream stream) {
  PackBackwardParams params;
  int layers = 0;
  unsigned blocks = 0;
  for (int i = 0; i < groups; ++i) {
    PackBackwardPart& part = params.parts[i] = part_of(first[i], host + layers, param);
    part.first = layers;
    layers += part.group.count;
    blocks = std::max(blocks, blocks_of(part));
  }
  params.table = layers > kLayersByValue ? device : nullptr;
  if (params.table == nullptr) std::copy(host, host + layers, params.layers);
  if (layers == 0 || blocks == 0) return;
  const dim3 grid(blocks, static_cast<unsigned>(groups));
  with_type(param, [&](auto p) {
    using P = TypeOf<decltype(p)>;
    const size_t shared = kStreamThreads / kWarp * sizeof(Wide<P>);
    RASA_LAUNCH((pack_backward_kernel<P>), grid, kStreamThreads, shared, stream, params);
  });
}

}  // namespace rasa_ext
