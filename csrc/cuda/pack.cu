// Launcher of pack.cuh.
#include "pack.cuh"

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {

void launch_pack(const PackGroup& group, const PackLayer* host, const PackLayer* device,
                 DType param, DType dtype, Stream stream) {
  const int ups = groups_of(group.own, group.Rp - group.own, kRanks) * pieces_of(group.out);
  const int64_t downs = int64_t{group.Rp} * pieces_of(group.in);
  const unsigned blocks = ups + ceil_div(downs, kStreamThreads / kWarp);
  if (group.layers == 0 || blocks == 0) return;
  const dim3 grid(blocks, static_cast<unsigned>(group.layers));
  const PackParams params{group, ups, {host, device, group.layers}};
  with_types(param, dtype, [&](auto p, auto t) {
    using P = TypeOf<decltype(p)>;
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((pack_kernel<P, T>), grid, kStreamThreads, PackTile<P>::kBytes, stream, params);
  });
}

}  // namespace rasa_ext
