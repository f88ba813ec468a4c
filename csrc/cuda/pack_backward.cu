// Launcher of pack_backward.cuh.
#include "pack_backward.cuh"

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {

void launch_pack_backward(const PackBackwardGroup& group, const PackBackwardLayer* host,
                          const PackBackwardLayer* device, DType param, Stream stream) {
  const DType wide = accumulation(param);
  bool whole_in =
      at_16_bytes(group.dA, group.in, param) && at_16_bytes(group.dA_pool, group.in, param);
  bool whole_out = true;
  for (int i = 0; i < group.layers; ++i) {
    whole_in = whole_in && at_16_bytes(host[i].dAp, group.in, wide);
    whole_out = whole_out && at_16_bytes(host[i].dBp, group.out, wide);
  }
  const bool up = group.out > 0 || group.dd != nullptr;
  const int dots = up ? group.layers * groups_of(group.own, group.pooled, kDotRanks) : 0;
  const int sums = group.layers > 1 ? groups_of(0, group.pooled, kRanks) * pieces_of(group.out) : 0;
  const int64_t pieces = (int64_t{group.layers} * group.own + group.pooled) * pieces_of(group.in);
  const unsigned blocks = dots + sums + ceil_div(pieces, kStreamThreads / kWarp);
  if (group.layers == 0 || blocks == 0) return;
  const PackBackwardParams params{group,    dots,      sums,
                                  whole_in, whole_out, {host, device, group.layers}};
  with_type(param, [&](auto p) {
    using P = TypeOf<decltype(p)>;
    RASA_LAUNCH((pack_backward_kernel<P>), blocks, kStreamThreads, kBackwardBytes<P>, stream,
                params);
  });
}

}  // namespace rasa_ext
