// Checks, allocation and launches of pack and its backward, for one layer and for a group.
#include <stdexcept>
#include <vector>

#include "device.h"
#include "launchers.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// One layer's adapter: shapes checked, every tensor dense.
struct Adapter {
  Tensor A, B, d;
  std::optional<Tensor> A_pool, B_pool;
  int in, out, own, pooled;

  const void* pool_A() const { return A_pool ? A_pool->data_ptr() : nullptr; }
  const void* pool_B() const { return B_pool ? B_pool->data_ptr() : nullptr; }
};

// The kernels compute in float64 only where all is float64.
DType param_for(DType param, DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : param;
}

Adapter checked(const char* op, const Tensor& A, const std::optional<Tensor>& A_pool,
                const Tensor& B, const std::optional<Tensor>& B_pool,
                const std::optional<Tensor>& d, DType param) {
  const Checks checks(op, "A", A);
  checks.shape("A", A, {-1, -1});
  checks.like("B", B, {-1, A.size(0)});
  if (A_pool.has_value() != B_pool.has_value()) {
    checks.refuse("A_pool", "both pools or neither", A_pool ? "A_pool alone" : "B_pool alone");
  }
  int64_t pooled = 0;
  if (A_pool) {
    pooled = A_pool->size(0);
    checks.like("A_pool", *A_pool, {-1, A.size(1)});
    checks.like("B_pool", *B_pool, {B.size(0), pooled});
  }
  if (d) checks.like("d", *d, {A.size(0) + pooled});
  Adapter adapter{dense(A, param),
                  dense(B, param),
                  d ? dense(*d, param) : ones(A, A.size(0) + pooled, param),
                  {},
                  {},
                  to_int("in_features", A.size(1)),
                  to_int("out_features", B.size(0)),
                  to_int("rank", A.size(0)),
                  to_int("pooled rank", pooled)};
  if (A_pool) {
    adapter.A_pool = dense(*A_pool, param);
    adapter.B_pool = dense(*B_pool, param);
  }
  return adapter;
}

int padded(const char* op, const Adapter& adapter, int64_t multiple) {
  if (multiple < 1) {
    throw std::runtime_error("rasa_ext::" + std::string(op) +
                             ": multiple: expected at least 1, got " + std::to_string(multiple) +
                             ".");
  }
  const int64_t rank = adapter.own + adapter.pooled;
  return to_int("padded rank", (rank + multiple - 1) / multiple * multiple);
}

PackLayer entry(const Adapter& adapter, void* Ap, void* Bt, int width) {
  return {adapter.A.data_ptr(),
          adapter.pool_A(),
          adapter.B.data_ptr(),
          adapter.pool_B(),
          adapter.d.data_ptr(),
          Ap,
          Bt,
          adapter.in,
          adapter.out,
          adapter.own,
          adapter.pooled,
          width,
          0};
}

// From what pack computes in to what was asked for.
std::tuple<Tensor, Tensor> delivered(const Tensor& Ap, const Tensor& Bt, DType dtype) {
  return {dense(Ap, dtype), dense(Bt, dtype)};
}

}  // namespace

std::tuple<Tensor, Tensor> pack(const Tensor& A, const std::optional<Tensor>& A_pool,
                                const Tensor& B, const std::optional<Tensor>& B_pool,
                                const std::optional<Tensor>& d,
                                torch::headeronly::ScalarType scalar_type, int64_t multiple) {
  const DType asked = dtype_of(scalar_type), param = param_for(dtype_of(A), asked);
  const DType dtype = param == DType::kFloat64 ? param : asked;
  const Device device(A);
  const Adapter adapter = checked("pack", A, A_pool, B, B_pool, d, param);
  const int width = padded("pack", adapter, multiple);
  const Tensor Ap = empty(A, {width, adapter.in}, dtype);
  const Tensor Bt = empty(A, {adapter.out, width}, dtype);
  launch_pack(entry(adapter, Ap.data_ptr(), Bt.data_ptr(), width), param, dtype, device.stream());
  device.check_launch("pack");
  return delivered(Ap, Bt, asked);
}

std::tuple<Tensor, Tensor> pack_layers(
    const std::vector<Tensor>& A, const std::optional<Tensor>& A_pool, const std::vector<Tensor>& B,
    const std::optional<Tensor>& B_pool, const std::vector<Tensor>& d,
    torch::headeronly::ScalarType scalar_type, int64_t multiple) {
  check_layers("pack_layers", A.size(), B.size());
  check_layers("pack_layers", A.size(), d.size());
  const DType asked = dtype_of(scalar_type), param = param_for(dtype_of(A[0]), asked);
  const DType dtype = param == DType::kFloat64 ? param : asked;
  const Device device(A[0]);
  const Checks checks("pack_layers", "A[0]", A[0]);
  std::vector<Adapter> adapters;
  for (size_t i = 0; i < A.size(); ++i) {
    checks.like("A[i]", A[i], {A[0].size(0), A[0].size(1)});
    checks.like("B[i]", B[i], {B[0].size(0), B[0].size(1)});
    adapters.push_back(checked("pack_layers", A[i], A_pool, B[i], B_pool, d[i], param));
  }
  const int width = padded("pack_layers", adapters[0], multiple);
  const int64_t layers = static_cast<int64_t>(A.size());
  const Tensor Ap = empty(A[0], {layers, width, adapters[0].in}, dtype);
  const Tensor Bt = empty(A[0], {layers, adapters[0].out, width}, dtype);
  std::vector<PackLayer> table;
  for (int64_t i = 0; i < layers; ++i) {
    table.push_back(
        entry(adapters[i], layer_of(Ap, i).data_ptr(), layer_of(Bt, i).data_ptr(), width));
  }
  const Tensor uploaded = device.upload(A[0], table.data(), table.size() * sizeof(PackLayer));
  launch_pack_layers(table.data(), static_cast<const PackLayer*>(uploaded.data_ptr()),
                     static_cast<int>(layers), param, dtype, device.stream());
  device.check_launch("pack_layers");
  return delivered(Ap, Bt, asked);
}

std::tuple<Tensor, std::vector<Tensor>> pack_siblings(
    const std::vector<Tensor>& A, const std::vector<Tensor>& A_pool, const std::vector<Tensor>& B,
    const std::vector<Tensor>& B_pool, const std::vector<Tensor>& d,
    torch::headeronly::ScalarType scalar_type, int64_t multiple) {
  const char* op = "pack_siblings";
  check_layers(op, A.size(), B.size());
  for (const auto* list : {&A_pool, &B_pool, &d}) {
    if (!list->empty()) check_layers(op, A.size(), list->size());
  }
  const DType asked = dtype_of(scalar_type), param = param_for(dtype_of(A[0]), asked);
  const DType dtype = param == DType::kFloat64 ? param : asked;
  const Device device(A[0]);
  const Checks checks(op, "A[0]", A[0]);
  const auto at = [](const std::vector<Tensor>& list, size_t i) {
    return list.empty() ? std::nullopt : std::optional<Tensor>(list[i]);
  };
  std::vector<Adapter> adapters;
  std::vector<int> widths;
  int64_t total = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    checks.like("A[i]", A[i], {-1, A[0].size(1)});
    adapters.push_back(checked(op, A[i], at(A_pool, i), B[i], at(B_pool, i), at(d, i), param));
    widths.push_back(padded(op, adapters[i], multiple));
    total += widths[i];
  }
  // A launch for each, with no table to upload: there are two or three.
  const Tensor Ap = empty(A[0], {to_int("padded rank", total), adapters[0].in}, dtype);
  std::vector<Tensor> Bt;
  int64_t row = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    const Tensor up = empty(A[0], {adapters[i].out, widths[i]}, dtype);
    void* down = matrix_of(Ap).t().columns(row, widths[i]).data;
    launch_pack(entry(adapters[i], down, up.data_ptr(), widths[i]), param, dtype, device.stream());
    device.check_launch(op);
    Bt.push_back(dense(up, asked));
    row += widths[i];
  }
  return {dense(Ap, asked), Bt};
}

}  // namespace rasa_ext
