// Launchers of pack.cuh.
#include "pack.cuh"

#include <algorithm>

#include "switches.cuh"

namespace rasa_ext {
namespace {

// `host` are the layers; `params` already says where the device finds them.
void launch(PackParams params, const PackLayer* host, int count, DType param, DType dtype,
            Stream stream) {
  int64_t elements = 0;  // of every Bt
  for (int i = 0; i < count; ++i) elements += int64_t{host[i].out} * host[i].Rp;
  params.tile = tile_elements(elements, static_cast<int>(size_of(dtype)));
  int blocks = 0;
  for (int i = 0; i < count; ++i) {
    const PackLayer& layer = host[i];
    if (layer.Rp == 0) continue;
    blocks = std::max(blocks, down_blocks(layer.in, layer.Rp) +
                                  up_tiling(layer.out, layer.Rp, params.tile).count);
  }
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
  with_types(param, dtype, [&](auto p, auto t) {
    using P = TypeOf<decltype(p)>;
    using T = TypeOf<decltype(t)>;
    RASA_LAUNCH((pack_kernel<P, T>), grid, kStreamThreads, params.tile * sizeof(T), stream, params);
  });
}

}  // namespace

void launch_pack(const PackLayer& layer, DType param, DType dtype, Stream stream) {
  launch({layer, nullptr, 0}, &layer, 1, param, dtype, stream);
}

void launch_pack_layers(const PackLayer* host, const PackLayer* device, int count, DType param,
                        DType dtype, Stream stream) {
  launch({PackLayer{}, device, 0}, host, count, param, dtype, stream);
}

}  // namespace rasa_ext
