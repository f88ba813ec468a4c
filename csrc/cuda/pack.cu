// Launcher of pack.cuh.
#include "pack.cuh"

#include <algorithm>

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {

void launch_pack(const PackLayer* host, const PackLayer* device, int count, DType param,
                 DType dtype, Stream stream) {
  PackParams params;
  params.table = count > kLayersByValue ? device : nullptr;
  int64_t pieces = 0;
  for (int i = 0; i < count; ++i) {
    if (params.table == nullptr) params.layers[i] = host[i];
    pieces = std::max(pieces, pieces_of(host[i]));
  }
  if (pieces == 0) return;
  const dim3 grid(ceil_div(pieces, kStreamThreads / kWarp), static_cast<unsigned>(count));
  with_types(param, dtype, [&](auto p, auto t) {
    using P = TypeOf<decltype(p)>;
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((pack_kernel<P, T>), grid, kStreamThreads, 0, stream, params);
  });
}

}  // namespace rasa_ext
