// Low-rank linears of a group's L layers on given activations, and their backward, as batched
// products. A pool's pack is an operand at distance 0, and the base's weights are where the model
// has them.
#include <vector>

#include "batch.h"
#include "blas.h"
#include "device.h"
#include "heuristics.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// What forward and backward are given: shapes checked, everything readable by a GEMM.
struct Stack {
  int layers;
  DType dtype;
  Tensor x, Ap, Bp;
  std::optional<Tensor> Ap_pool, Bp_pool, d_pool;

  int64_t tokens() const { return x.size(1); }
  int64_t in() const { return x.size(2); }
  int64_t out() const { return Bp.size(2); }
  int64_t own() const { return Ap.size(1); }
  int64_t pooled() const { return Ap_pool ? Ap_pool->size(0) : 0; }
};

Stack checked(const Checks& checks, const char* op, const Tensor& x,
              const std::vector<Tensor>& weights, const Tensor& Ap, const Tensor& Bp,
              const std::optional<Tensor>& Ap_pool, const std::optional<Tensor>& Bp_pool,
              const std::optional<Tensor>& d_pool) {
  checks.shape("x", x, {-1, -1, -1});
  check_layers(op, "x", static_cast<size_t>(x.size(0)), "weights", weights.size());
  const int64_t layers = x.size(0), in = x.size(2);
  checks.like("Ap", Ap, {layers, -1, in});
  checks.like("Bp", Bp, {layers, Ap.size(1), -1});
  for (const Tensor& weight : weights) checks.like("weights", weight, {Bp.size(2), in});
  const DType dtype = dtype_of(x);
  Stack stack{static_cast<int>(layers),
              dtype,
              batch_operand(x, dtype),
              batch_operand(Ap, dtype),
              batch_operand(Bp, dtype),
              {},
              {},
              {}};
  if (Ap_pool.has_value() != Bp_pool.has_value() || Ap_pool.has_value() != d_pool.has_value()) {
    checks.refuse("Ap_pool", "Ap_pool, Bp_pool and d_pool, or none of them", "some of them");
  }
  if (Ap_pool) {
    checks.like("Ap_pool", *Ap_pool, {-1, in});
    checks.like("Bp_pool", *Bp_pool, {Ap_pool->size(0), Bp.size(2)});
    checks.shape("d_pool", *d_pool, {layers, Ap_pool->size(0)});
    checks.device("d_pool", *d_pool);
    stack.Ap_pool = gemm_operand(*Ap_pool);
    stack.Bp_pool = gemm_operand(*Bp_pool);
    stack.d_pool = dense(*d_pool, dtype);
  }
  return stack;
}

// Products one after the other; the first one into a result that holds nothing has beta = 0.
class Products {
 public:
  Products(const Device& device, int layers) : device_(device), layers_(layers) {}

  void run(const Batch& a, const Batch& b, const Batch& c, bool add) const {
    gemm_strided(device_.blas(), multiply(a, b, c, add, layers_));
  }

  // C_l = or += A_l W_l, or W_l^T, with one weight a layer: a batch where each product is small.
  void run_base(const Tensor& a, const std::vector<Tensor>& weights, bool transpose,
                const Tensor& c, bool add) const {
    const Batch left = layers_of(a), result = layers_of(c);
    const bool batch =
        lie_alike(weights) && is_aligned(left, layers_) && is_aligned(result, layers_);
    if (!batch || fills_device(c.size(1), c.size(2))) {
      for (int i = 0; i < layers_; ++i) {
        const Tensor weight = gemm_operand(weights[i]);
        const Matrix base = transpose ? matrix_of(weight).t() : matrix_of(weight);
        gemm(device_.blas(),
             multiply(matrix_of(layer_of(a, i)), base, matrix_of(layer_of(c, i)), add));
      }
      return;
    }
    const Scattered base = scattered(weights);
    std::optional<Tensor> table;
    gemm_pointers(device_.blas(),
                  multiply(device_, c, scattered(left, layers_), transpose ? base.t() : base,
                           scattered(result, layers_), add, table));
  }

  // C = A^T B summed over the layers: their tokens are rows of one product, in their order.
  void run_summed(const Tensor& a, const Tensor& b, const Tensor& c) const {
    const Tensor left = dense(a, dtype_of(a)), right = dense(b, dtype_of(b));
    gemm(device_.blas(),
         multiply(matrix_of(all_rows(left)).t(), matrix_of(all_rows(right)), matrix_of(c), 0));
  }

 private:
  const Device& device_;
  int layers_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_group(const Tensor& x, const std::vector<Tensor>& weights,
                                                const std::optional<Tensor>& bias, const Tensor& Ap,
                                                const Tensor& Bp,
                                                const std::optional<Tensor>& Ap_pool,
                                                const std::optional<Tensor>& Bp_pool,
                                                const std::optional<Tensor>& d_pool) {
  const Checks checks("linear_group", "x", x);
  const Stack stack = checked(checks, "linear_group", x, weights, Ap, Bp, Ap_pool, Bp_pool, d_pool);
  if (bias) checks.like("bias", *bias, {stack.layers, stack.out()});
  const Device device(x);
  Tensor y = empty(x, {stack.layers, stack.tokens(), stack.out()}, stack.dtype);
  const Tensor U = empty(x, {stack.layers, stack.tokens(), stack.own()}, stack.dtype);
  const Tensor V = stack.Ap_pool
                       ? empty(x, {stack.layers, stack.tokens(), stack.pooled()}, stack.dtype)
                       : nothing(x, stack.dtype);
  if (stack.tokens() == 0) return {y, U, V};
  const Products products(device, stack.layers);
  bool set = bias.has_value();
  if (bias) fill_rows_of_layers(y, *bias);
  if (stack.pooled() > 0) {
    products.run(layers_of(stack.x), for_all_layers(*stack.Ap_pool).t(), layers_of(V), false);
    const Tensor scaled = scale_columns(V, *stack.d_pool);
    products.run(layers_of(scaled), for_all_layers(*stack.Bp_pool), layers_of(y), set);
    set = true;
  }
  if (stack.own() > 0) {
    products.run(layers_of(stack.x), layers_of(stack.Ap).t(), layers_of(U), false);
    products.run(layers_of(U), layers_of(stack.Bp), layers_of(y), set);
    set = true;
  }
  products.run_base(stack.x, weights, true, y, set);
  return {y, U, V};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_group_backward(
    const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights, const Tensor& U,
    const Tensor& V, const Tensor& Ap, const Tensor& Bp, const std::optional<Tensor>& Ap_pool,
    const std::optional<Tensor>& Bp_pool, const std::optional<Tensor>& d_pool, bool need_x,
    bool need_adapter) {
  const Checks checks("linear_group_backward", "x", x);
  const Stack stack =
      checked(checks, "linear_group_backward", x, weights, Ap, Bp, Ap_pool, Bp_pool, d_pool);
  const DType dtype = stack.dtype, wide = accumulation(dtype);
  const int64_t layers = stack.layers, tokens = stack.tokens(), in = stack.in(), out = stack.out();
  const int64_t own = stack.own(), pooled = stack.pooled();
  checks.like("grad", grad, {layers, tokens, out});
  checks.like("U", U, {layers, tokens, own});
  if (stack.Ap_pool) checks.like("V", V, {layers, tokens, pooled});

  const Device device(x);
  const auto result = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? empty(x, sizes, wide) : nothing(x, wide);
  };
  Tensor dx = need_x ? empty(x, {layers, tokens, in}, dtype) : nothing(x, dtype);
  Tensor dAp = result(need_adapter, {layers, own, in});
  Tensor dBp = result(need_adapter, {layers, own, out});
  Tensor dAp_pool = result(need_adapter, {pooled, in}),
         dBp_pool = result(need_adapter, {pooled, out});
  Tensor dd = result(need_adapter, {layers, pooled});
  if (tokens == 0 && need_adapter) {
    for (Tensor* each : {&dAp, &dBp, &dAp_pool, &dBp_pool, &dd}) fill_zero(*each);
  }
  const Products products(device, stack.layers);
  const Tensor G = batch_operand(grad, dtype);
  const bool work = tokens > 0 && (need_x || need_adapter);
  bool set = false;  // whether dx holds something
  if (work && pooled > 0) {
    const Tensor K = empty(x, {layers, tokens, pooled}, dtype);
    products.run(layers_of(G), for_all_layers(*stack.Bp_pool).t(), layers_of(K), false);
    const Tensor scaled = scale_columns(K, *stack.d_pool);
    if (need_adapter) {
      dd = sum_of_products(V, K, wide);
      products.run_summed(scale_columns(V, *stack.d_pool), G, dBp_pool);
      products.run_summed(scaled, stack.x, dAp_pool);
    }
    if (need_x) {
      products.run(layers_of(scaled), for_all_layers(*stack.Ap_pool), layers_of(dx), false);
      set = true;
    }
  }
  if (work && own > 0) {
    const Tensor H = empty(x, {layers, tokens, own}, dtype);
    products.run(layers_of(G), layers_of(stack.Bp).t(), layers_of(H), false);
    if (need_adapter) {
      products.run(layers_of(batch_operand(U, dtype)).t(), layers_of(G), layers_of(dBp), false);
      products.run(layers_of(H).t(), layers_of(stack.x), layers_of(dAp), false);
    }
    if (need_x) {
      products.run(layers_of(H), layers_of(stack.Ap), layers_of(dx), set);
      set = true;
    }
  }
  if (work && need_x) products.run_base(G, weights, false, dx, set);
  return {dx, dAp, dBp, dAp_pool, dBp_pool, dd};
}

}  // namespace rasa_ext
