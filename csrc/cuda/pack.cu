// Launcher of pack.cuh.
#include "pack.cuh"

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {

void launch_pack(const PackGroup& group, const PackLayer* host, const PackLayer* device,
                 DType param, DType dtype, Stream stream) {
  const int64_t pieces = int64_t{group.Rp} * (pieces_of(group.in) + pieces_of(group.out));
  if (group.layers == 0 || pieces == 0) return;
  const dim3 grid(ceil_div(pieces, kStreamThreads / kWarp), static_cast<unsigned>(group.layers));
  const PackParams params{group, {host, device, group.layers}};
  with_types(param, dtype, [&](auto p, auto t) {
    using P = TypeOf<decltype(p)>;
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((pack_kernel<P, T>), grid, kStreamThreads, 0, stream, params);
  });
}

}  // namespace rasa_ext
