// Launchers of decode.cuh.
#include "decode.cuh"

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {
namespace {

template <typename T, int tokens>
void launch(const DecodeParams& params, Stream stream) {
  const DecodeCall& call = params.call;
  const unsigned tiles = ceil_div(call.M, tokens);
  const int rows = kDecodeThreads / kWarp * kShrinkRows;
  const dim3 shrink_grid(ceil_div(call.Rp, rows), static_cast<unsigned>(params.splits), tiles);
  RASA_LAUNCH((shrink_kernel<T, tokens>), shrink_grid, kDecodeThreads, 0, stream, params);
  // The first block of the expand kernel writes U, so one block runs even if y has no columns.
  const int step = params.whole_out ? kExpandStep : 1;
  const unsigned blocks = ceil_div(call.out, kDecodeThreads * step);
  const dim3 expand_grid(blocks != 0 ? blocks : 1, tiles);
  const size_t shared = sizeof(float) * tokens * call.Rp;
  RASA_LAUNCH((expand_kernel<T, tokens>), expand_grid, kDecodeThreads, shared, stream, params);
}

}  // namespace

bool decode_fits(int M, int Rp, DType dtype) {
  return dtype != DType::kFloat64 && M <= kDecodeTokens && token_tile(M, Rp) > 0;
}

size_t decode_workspace(int M, int in, int Rp) {
  return sizeof(float) * static_cast<size_t>(decode_splits(in)) * M * Rp;
}

void launch_decode(const DecodeCall& call, DType dtype, Stream stream) {
  if (call.M == 0 || call.Rp == 0) return;
  const DecodeParams params{
      call, decode_splits(call.in), decode_part(call.in),
      at_16_bytes(call.x, call.in, dtype) && at_16_bytes(call.Ap, call.in, dtype),
      at_16_bytes(call.Bp, call.out, dtype) && at_16_bytes(call.y, call.out, dtype)};
  with_single_or_half(dtype, [&](auto t) {
    with_token_tile(token_tile(call.M, call.Rp), [&](auto tokens) {
      launch<TypeOf<decltype(t)>, decltype(tokens)::value>(params, stream);
    });
  });
}

}  // namespace rasa_ext
