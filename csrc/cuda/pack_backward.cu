// Launchers of pack_backward.cuh.
#include "pack_backward.cuh"

#include <algorithm>

#include "switches.cuh"

namespace rasa_ext {
namespace {

unsigned blocks_for(int64_t elements, int64_t per_block) {
  return static_cast<unsigned>((elements + per_block - 1) / per_block);
}

// What one launch can do for layers of the shape of `shape`; the pool's gradients if params.pool.
void launch(PackBackwardParams params, const PackBackwardLayer& shape, int count, DType param,
            Stream stream) {
  const int R = shape.own + shape.pooled;
  if (R == 0 || count == 0) return;
  params.tiles = grad_tiles(shape.out);
  const dim3 grid(params.tiles + blocks_for(static_cast<int64_t>(R) * shape.in, kCopyElements),
                  static_cast<unsigned>(count));
  const dim3 sum_grid(blocks_for(R, kStreamThreads / kWarp), static_cast<unsigned>(count));
  with_type(param, [&](auto p) {
    using P = TypeOf<decltype(p)>;
    if (grid.x != 0) {
      const size_t shared = kGradCols * sizeof(GradColumn<Wide<P>>);
      RASA_LAUNCH((pack_backward_kernel<P>), grid, kStreamThreads, shared, stream, params);
    }
    RASA_LAUNCH((sum_dd_kernel<P>), sum_grid, kStreamThreads, 0, stream, params);
  });
}

}  // namespace

size_t pack_backward_workspace(int count, int out, int own, int pooled, DType param) {
  return static_cast<size_t>(count) * (own + pooled) * grad_tiles(out) *
         size_of(accumulation(param));
}

void launch_pack_backward(const PackBackwardLayer& layer, const PoolGrads& pool, void* workspace,
                          DType param, Stream stream) {
  launch({layer, nullptr, pool, workspace, 0}, layer, 1, param, stream);
}

void launch_pack_layers_backward(const PackBackwardLayer* host, const PackBackwardLayer* device,
                                 int count, const PoolGrads& pool, void* workspace, DType param,
                                 Stream stream) {
  if (count == 0) return;
  const PackBackwardLayer& shape = host[0];
  launch({PackBackwardLayer{}, device, PoolGrads{}, workspace, 0}, shape, count, param, stream);
  const dim3 grid(blocks_for(std::max(shape.in, shape.out), kStreamThreads * kSumElements),
                  static_cast<unsigned>(shape.pooled), 2);
  if (grid.x == 0 || grid.y == 0) return;
  const SumPoolParams params{device, count, pool};
  with_type(param, [&](auto p) {
    using P = TypeOf<decltype(p)>;
    RASA_LAUNCH((sum_pool_kernel<P>), grid, kStreamThreads, 0, stream, params);
  });
}

}  // namespace rasa_ext
