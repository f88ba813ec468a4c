// Low-rank linears of the L layers of a group on given activations, and the backward, as batched
// products. The base weights are not stacked: each is read from the model's own tensor.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "blas.h"
#include "device.h"
#include "heuristics.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// The inputs of forward and backward: shapes are checked, and a batch can read packs and x.
struct Stack {
  Tensor x, Ap, Bp;

  Stack(const Checks& checks, const char* op, const Tensor& x_, const std::vector<Tensor>& weights,
        const Tensor& Ap_, const Tensor& Bp_)
      : x(x_), Ap(Ap_), Bp(Bp_) {
    checks.shape("x", x, {-1, -1, -1});
    check_layers(op, "x", static_cast<size_t>(x.size(0)), "weights", weights.size());
    checks.like("Ap", Ap, {layers(), -1, in()});
    checks.like("Bp", Bp, {layers(), rank(), -1});
    for (const Tensor& weight : weights) checks.like("weights", weight, {out(), in()});
    for (Tensor* each : {&x, &Ap, &Bp}) *each = batch_operand(*each, dtype_of(x_));
  }

  int64_t layers() const { return x.size(0); }
  int64_t tokens() const { return x.size(1); }
  int64_t in() const { return x.size(2); }
  int64_t out() const { return Bp.size(2); }
  int64_t rank() const { return Ap.size(1); }
};

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool is_aligned(const Matrix& batch) {
  return is_aligned(batch.data) && (batch.layers == 1 || is_aligned(batch.from(1).data));
}

// Whether a GEMM can read all matrices, and all have equal strides. cuBLAS cannot see the alignment
// of a batch's pointers, so it requires 16 bytes for half types and TF32 (cublasGemmBatchedEx).
bool lie_alike(const std::vector<Tensor>& matrices) {
  const Matrix first = matrix_of(matrices[0]);
  return is_gemm_operand(first) &&
         std::all_of(matrices.begin(), matrices.end(), [&](const Tensor& matrix) {
           return matrix.stride(0) == first.row_stride && matrix.stride(1) == first.col_stride &&
                  is_aligned(matrix.data_ptr());
         });
}

// C_l += A_l W_l, or A_l W_l^T, with one weight per layer. Runs as a batch if each product is
// small.
void add_base(const Device& device, const Tensor& a, const std::vector<Tensor>& weights,
              bool transpose, const Tensor& c) {
  Matrix left = layers_of(a), sum = layers_of(c);
  if (c.numel() == 0 || left.cols == 0) return;
  const auto matrix = [&](const Tensor& weight) {
    return transpose ? matrix_of(weight).t() : matrix_of(weight);
  };
  const Blas blas = device.blas();
  const bool batch = lie_alike(weights) && is_aligned(left) && is_aligned(sum);
  if (!batch || fills_device(c.size(1), c.size(2))) {
    for (int i = 0; i < sum.layers; ++i) {
      const Tensor weight = gemm_operand(weights[i]);
      gemm(blas, multiply(left.from(i), matrix(weight), sum.from(i), true));
    }
    return;
  }
  std::vector<void*> pointers;  // three arrays, one after the other
  for (int i = 0; i < sum.layers; ++i) pointers.push_back(left.from(i).data);
  for (const Tensor& weight : weights) pointers.push_back(weight.data_ptr());
  for (int i = 0; i < sum.layers; ++i) pointers.push_back(sum.from(i).data);
  const Tensor table = device.upload(c, pointers.data(), pointers.size() * sizeof(void*));
  Matrix base = matrix(weights[0]);
  left.data = table.data_ptr();
  base.data = static_cast<void**>(left.data) + sum.layers;
  sum.data = static_cast<void**>(base.data) + sum.layers;
  gemm_pointers(blas, multiply(left, base, sum, true));
}

}  // namespace

std::tuple<Tensor, Tensor> linear_group(const Tensor& x, const std::vector<Tensor>& weights,
                                        const std::optional<Tensor>& bias, const Tensor& Ap,
                                        const Tensor& Bp) {
  const Checks checks("linear_group", "x", x);
  const Stack stack(checks, "linear_group", x, weights, Ap, Bp);
  if (bias) checks.like("bias", *bias, {stack.layers(), stack.out()});
  const Device device(x);
  const Blas blas = device.blas();
  Tensor y = empty(x, {stack.layers(), stack.tokens(), stack.out()}, dtype_of(x));
  const Tensor U = empty(x, {stack.layers(), stack.tokens(), stack.rank()}, dtype_of(x));
  const Matrix inner = layers_of(U);
  if (bias) fill_rows_of_layers(y, *bias);
  gemm_strided(blas, multiply(layers_of(stack.x), layers_of(stack.Ap).t(), inner, false));
  gemm_strided(blas, multiply(inner, layers_of(stack.Bp), layers_of(y), bias.has_value()));
  add_base(device, stack.x, weights, true, y);
  return {y, U};
}

std::tuple<Tensor, Tensor, Tensor> linear_group_backward(const Tensor& grad, const Tensor& x,
                                                         const std::vector<Tensor>& weights,
                                                         const Tensor& U, const Tensor& Ap,
                                                         const Tensor& Bp, bool need_x,
                                                         bool need_adapter) {
  const Checks checks("linear_group_backward", "x", x);
  const Stack stack(checks, "linear_group_backward", x, weights, Ap, Bp);
  const DType dtype = dtype_of(x), wide = accumulation(dtype);
  const int64_t layers = stack.layers(), tokens = stack.tokens(), rank = stack.rank();
  checks.like("grad", grad, {layers, tokens, stack.out()});
  checks.like("U", U, {layers, tokens, rank});

  const Device device(x);
  const auto result = [&](bool needed, std::initializer_list<int64_t> sizes, DType its) {
    return needed ? empty(x, sizes, its) : nothing(x, its);
  };
  const Tensor dx = result(need_x, {layers, tokens, stack.in()}, dtype);
  const Tensor dAp = result(need_adapter, {layers, rank, stack.in()}, wide);
  const Tensor dBp = result(need_adapter, {layers, rank, stack.out()}, wide);
  if (!need_x && !need_adapter) return {dx, dAp, dBp};
  const Tensor G = batch_operand(grad, dtype), H = empty(x, {layers, tokens, rank}, dtype);
  const Blas blas = device.blas();
  gemm_strided(blas, multiply(layers_of(G), layers_of(stack.Bp).t(), layers_of(H), false));
  if (need_adapter) {
    const Tensor inner = batch_operand(U, dtype);
    gemm_strided(blas, multiply(layers_of(inner).t(), layers_of(G), layers_of(dBp), false));
    gemm_strided(blas, multiply(layers_of(H).t(), layers_of(stack.x), layers_of(dAp), false));
  }
  if (need_x) {
    gemm_strided(blas, multiply(layers_of(H), layers_of(stack.Ap), layers_of(dx), false));
    add_base(device, G, weights, false, dx);
  }
  return {dx, dAp, dBp};
}

}  // namespace rasa_ext
