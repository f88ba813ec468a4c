// Launchers of skinny.cuh.
#include "skinny.cuh"

#include "launch.cuh"
#include "switches.cuh"

namespace rasa_ext {
namespace {

// Bytes of shared memory that a block may have on sm_120.
constexpr size_t kMostShared = 99 * 1024;

// Whether rows of 16-bit elements, `stride` apart, are all 16-byte aligned.
bool whole_rows(const void* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 8 == 0;
}

bool is_both(const SkinnyCall& call) {
  return call.P != nullptr && call.Q != nullptr && call.mask == nullptr && call.Rp <= kBothRanks;
}

int group_of(const SkinnyCall& call) {
  return is_both(call) ? grad_group(call.M, call.N, kBothTokens, kBothFeatures)
                       : grad_group(call.M, call.N, kGradTokens, kGradFeatures);
}

// Returns the number of partial sums that `down` writes.
int down_count(const SkinnyCall& call) {
  if (call.P == nullptr) return 0;
  return ceil_div(call.N, is_both(call) ? kBothFeatures : down_part(call.M, call.N));
}
// Returns the number of partial sums that `grad` writes, or 0 if the only one is C itself.
int grad_count(const SkinnyCall& call) {
  const int count = call.Q == nullptr ? 0 : ceil_div(call.M, group_of(call));
  return count > 1 ? count : 0;
}

template <typename T, int R>
void launch_down(const SkinnyParams& params, Stream stream) {
  const SkinnyCall& call = params.call;
  const dim3 grid(ceil_div(call.M, kDownTokens), ceil_div(call.N, params.part));
  constexpr size_t kShared = sizeof(DownStage<T, R>) * kDownRing<R>;
  static_assert(kShared <= kMostShared, "a block of every card");
  RASA_LAUNCH_LARGE((down_kernel<T, R>), grid, kSkinnyThreads, kShared, stream, params);
}

template <typename T, int R, bool both>
void launch_grad(const SkinnyParams& params, Stream stream) {
  const SkinnyCall& call = params.call;
  const dim3 grid(ceil_div(call.N, kTileFeatures<both>), ceil_div(call.M, params.group));
  constexpr size_t kShared = sizeof(GradShared<T, R, both>);
  static_assert(kShared <= kMostShared, "a block of every card");
  RASA_LAUNCH_LARGE((grad_kernel<T, R, both>), grid, kSkinnyThreads, kShared, stream, params);
}

template <typename T>
void launch_sum(const SkinnyParams& params, int downs, int grads, Stream stream) {
  const SkinnyCall& call = params.call;
  const Parts down{params.down_parts,
                   call.D,
                   call.M,
                   call.D_stride,
                   call.Rp,
                   downs,
                   static_cast<float>(call.scale)};
  const Parts grad{params.grad_parts, call.C, call.Rp, call.N, call.N, grads, 1.0f};
  const auto blocks = [](const Parts& parts) {
    return parts.count == 0 ? 0 : ceil_div(parts.rows * parts.cols, 4 * kSkinnyThreads);
  };
  const unsigned first = blocks(down), all = first + blocks(grad);
  if (all == 0) return;
  RASA_LAUNCH((sum_kernel<T>), all, kSkinnyThreads, 0, stream, down, grad, static_cast<int>(first));
}

}  // namespace

bool skinny_fits(const SkinnyCall& call, DType dtype) {
  const auto narrow = [&](const void* rows, int64_t stride) {
    return rows == nullptr || whole_rows(rows, stride);
  };
  const bool masked = call.mask != nullptr;
  return (dtype == DType::kFloat16 || dtype == DType::kBFloat16) && call.Rp % 16 == 0 &&
         call.Rp > 0 && call.Rp <= kSkinnyRanks && call.M > 0 && call.N > 0 &&
         call.N % (masked ? 32 : 8) == 0 && reinterpret_cast<uintptr_t>(call.mask) % 4 == 0 &&
         whole_rows(call.S, call.S_stride) && narrow(call.P, call.P_stride) &&
         narrow(call.Q, call.Q_stride) && narrow(call.D, call.D_stride);
}

size_t skinny_workspace(const SkinnyCall& call) {
  const size_t rank = sizeof(float) * call.Rp;
  return rank * (static_cast<size_t>(down_count(call)) * call.M +
                 static_cast<size_t>(grad_count(call)) * call.N);
}

void launch_skinny(const SkinnyCall& call, DType dtype, Stream stream) {
  const int downs = down_count(call), grads = grad_count(call);
  float* workspace = static_cast<float*>(call.workspace);
  float* C = grads == 0 ? static_cast<float*>(call.C)
                        : workspace + static_cast<int64_t>(downs) * call.M * call.Rp;
  const SkinnyParams params{call, workspace, C, down_part(call.M, call.N), group_of(call)};
  with_half(dtype, [&](auto t) {
    using T = TypeOf<decltype(t)>;
    with_ranks(call.Rp, [&](auto ranks) {
      constexpr int R = decltype(ranks)::value;
      if constexpr (R <= kBothRanks) {
        if (is_both(call)) return launch_grad<T, R, true>(params, stream);
      }
      if (downs > 0) launch_down<T, R>(params, stream);
      if (call.Q != nullptr) launch_grad<T, R, false>(params, stream);
    });
    launch_sum<T>(params, downs, grads, stream);
  });
}

}  // namespace rasa_ext
