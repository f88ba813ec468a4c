// Launcher of pack_backward.cuh.
#include "pack_backward.cuh"

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {

void launch_pack_backward(const PackBackwardGroup& group, const PackBackwardLayer* host,
                          const PackBackwardLayer* device, DType param, Stream stream) {
  const DType wide = accumulation(param);
  const int count = group.count;
  PackBackwardParams params;
  params.group = group;
  params.table = count > kLayersByValue ? device : nullptr;
  params.whole_in = at_16_bytes(group.dA_pool, group.in, param);
  params.whole_out =
      at_16_bytes(group.B_pool, group.out, param) && at_16_bytes(group.dB_pool, group.out, param);
  bool dots = false;
  for (int i = 0; i < count; ++i) {
    const PackBackwardLayer& layer = host[i];
    if (params.table == nullptr) params.layers[i] = layer;
    params.whole_in = params.whole_in && at_16_bytes(layer.dAp, group.in, wide) &&
                      at_16_bytes(layer.dA, group.in, param);
    params.whole_out = params.whole_out && at_16_bytes(layer.dBp, group.out, wide) &&
                       at_16_bytes(layer.B, group.out, param) &&
                       at_16_bytes(layer.dB, group.out, param);
    dots = dots || group.out > 0 || layer.dd != nullptr;
  }
  params.dots = dots ? count * (group.own + group.pooled) : 0;
  int64_t pieces = (int64_t{count} * group.own + group.pooled) * pieces_of(group.in);
  if (count > 1) pieces += int64_t{group.pooled} * pieces_of(group.out);
  const unsigned blocks = params.dots + ceil_div(pieces, kStreamThreads / kWarp);
  if (count == 0 || blocks == 0) return;
  with_type(param, [&](auto p) {
    using P = TypeOf<decltype(p)>;
    const size_t shared = kStreamThreads / kWarp * sizeof(Wide<P>);
    RASA_LAUNCH((pack_backward_kernel<P>), blocks, kStreamThreads, shared, stream, params);
  });
}

}  // namespace rasa_ext
