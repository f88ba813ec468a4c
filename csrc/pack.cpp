// Checks, allocation and launches of pack and pack_backward, for the layers of a group.
#include <vector>

#include "device.h"
#include "launchers.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// Tensors as kernels read them: dense and of one dtype. The object keeps them alive until the
// launch.
class Operands {
 public:
  explicit Operands(DType dtype) : dtype_(dtype) {}

  const void* data(const Tensor& tensor) {
    kept_.push_back(dense(tensor, dtype_));
    return kept_.back().data_ptr();
  }
  const void* data(const std::optional<Tensor>& tensor) { return tensor ? data(*tensor) : nullptr; }

 private:
  DType dtype_;
  std::vector<Tensor> kept_;
};

// Returns the layers in device memory, or nullopt if they are few enough to pass by value.
template <typename Layer>
std::optional<Tensor> uploaded(const Device& device, const Tensor& like,
                               const std::vector<Layer>& layers) {
  if (layers.size() <= kLayersByValue) return std::nullopt;
  return device.upload(like, layers.data(), layers.size() * sizeof(Layer));
}

// Throws unless `others` has as many entries as `B`, or none.
void check_list(const char* op, const std::vector<Tensor>& B, const char* name,
                const std::vector<Tensor>& others) {
  check_layers(op, "B", B.size(), name, others.empty() ? B.size() : others.size());
}

}  // namespace

std::tuple<Tensor, Tensor> pack_group(const std::vector<Tensor>& A,
                                      const std::optional<Tensor>& A_pool,
                                      const std::vector<Tensor>& B,
                                      const std::optional<Tensor>& B_pool,
                                      const std::vector<Tensor>& d,
                                      torch::headeronly::ScalarType dtype, int64_t multiple) {
  const char* op = "pack_group";
  check_layers(op, "A", A.size(), "B", B.size());
  check_list(op, B, "d", d);
  const Checks checks(op, "A[0]", A[0]);
  checks.shape("A[0]", A[0], {-1, -1});
  checks.shape("B[0]", B[0], {-1, -1});
  const int64_t own = A[0].size(0), in = A[0].size(1), out = B[0].size(0);
  if (A_pool.has_value() != B_pool.has_value()) {
    checks.refuse("A_pool", "both pools or neither", A_pool ? "A_pool alone" : "B_pool alone");
  }
  if (A_pool) checks.like("A_pool", *A_pool, {-1, in});
  const int64_t pooled = A_pool ? A_pool->size(0) : 0;
  if (B_pool) checks.like("B_pool", *B_pool, {out, pooled});
  if (multiple < 1) checks.refuse("multiple", "at least 1", std::to_string(multiple));

  // The kernels compute in float64 only if both dtypes are float64.
  const DType asked = dtype_of(dtype);
  const bool wide = asked == DType::kFloat64 || dtype_of(A[0]) == DType::kFloat64;
  const DType param = wide ? DType::kFloat64 : dtype_of(A[0]);
  const DType made = wide ? DType::kFloat64 : asked;
  const Device device(A[0]);
  Operands operands(param);
  std::vector<PackLayer> layers;
  for (size_t i = 0; i < A.size(); ++i) {
    checks.like("A[i]", A[i], {own, in});
    checks.like("B[i]", B[i], {out, own});
    if (!d.empty()) checks.like("d[i]", d[i], {own + pooled});
    layers.push_back(
        {operands.data(A[i]), operands.data(B[i]), d.empty() ? nullptr : operands.data(d[i])});
  }
  const int64_t count = static_cast<int64_t>(A.size());
  const int64_t Rp = (own + pooled + multiple - 1) / multiple * multiple;
  const Tensor Ap = empty(A[0], {count, Rp, in}, made), Bp = empty(A[0], {count, Rp, out}, made);
  const PackGroup group{operands.data(A_pool),
                        operands.data(B_pool),
                        Ap.data_ptr(),
                        Bp.data_ptr(),
                        static_cast<int>(count),
                        to_int("in_features", in),
                        to_int("out_features", out),
                        to_int("rank", own),
                        to_int("pooled rank", pooled),
                        to_int("padded rank", Rp)};
  const std::optional<Tensor> table = uploaded(device, A[0], layers);
  launch_pack(group, layers.data(), static_cast<const PackLayer*>(data_of(table)), param, made,
              device.stream());
  device.check_launch(op);
  return {dense(Ap, asked), dense(Bp, asked)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_group_backward(
    const std::vector<Tensor>& dAp, const std::vector<Tensor>& dBp, const std::vector<Tensor>& B,
    const std::optional<Tensor>& B_pool, const std::vector<Tensor>& d) {
  const char* op = "pack_group_backward";
  const bool down = !dAp.empty(), up = !dBp.empty(), dots = up && !d.empty();
  check_list(op, B, "dAp", dAp);
  check_list(op, B, "dBp", dBp);
  check_list(op, B, "d", d);
  const Checks checks(op, "B[0]", B[0]);
  checks.shape("B[0]", B[0], {-1, -1});
  const int64_t out = B[0].size(0), own = B[0].size(1);
  if (B_pool) checks.like("B_pool", *B_pool, {out, -1});
  const int64_t pooled = B_pool ? B_pool->size(1) : 0, rank = own + pooled;
  if (down) checks.shape("dAp[0]", dAp[0], {-1, -1});
  const int64_t in = down ? dAp[0].size(1) : 0, count = static_cast<int64_t>(B.size());
  const auto check_grad = [&](const char* name, const Tensor& grad, int64_t width) {
    checks.shape(name, grad, {-1, width});
    checks.device(name, grad);
    if (grad.size(0) < rank) {
      checks.refuse(name, "at least " + std::to_string(rank) + " rows, as there are ranks",
                    std::to_string(grad.size(0)));
    }
  };

  const DType param = dtype_of(B[0]);
  const Device device(B[0]);
  Operands operands(param), grads(accumulation(param));
  std::vector<PackBackwardLayer> layers;
  for (size_t i = 0; i < B.size(); ++i) {
    checks.like("B[i]", B[i], {out, own});
    if (down) check_grad("dAp[i]", dAp[i], in);
    if (up) check_grad("dBp[i]", dBp[i], out);
    if (!d.empty()) checks.like("d[i]", d[i], {rank});
    layers.push_back({down ? grads.data(dAp[i]) : nullptr, up ? grads.data(dBp[i]) : nullptr,
                      operands.data(B[i]), d.empty() ? nullptr : operands.data(d[i])});
  }
  const auto result = [&](bool given, std::initializer_list<int64_t> sizes) {
    return given ? empty(B[0], sizes, param) : nothing(B[0], param);
  };
  const Tensor dA = result(down, {count, own, in}), dA_pool = result(down, {pooled, in});
  const Tensor dB = result(up, {count, out, own}), dB_pool = result(up, {out, pooled});
  const Tensor dd = result(dots, {count, rank});
  const PackBackwardGroup group{operands.data(B_pool),
                                dA.data_ptr(),
                                dA_pool.data_ptr(),
                                dB.data_ptr(),
                                dB_pool.data_ptr(),
                                dots ? dd.data_ptr() : nullptr,
                                static_cast<int>(count),
                                to_int("in_features", in),
                                up ? to_int("out_features", out) : 0,
                                to_int("rank", own),
                                to_int("pooled rank", pooled)};
  const std::optional<Tensor> table = uploaded(device, B[0], layers);
  launch_pack_backward(group, layers.data(), static_cast<const PackBackwardLayer*>(data_of(table)),
                       param, device.stream());
  device.check_launch(op);
  return {dA, dA_pool, dB, dB_pool, dd};
}

}  // namespace rasa_ext
