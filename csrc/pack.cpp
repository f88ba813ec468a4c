// Checks, allocation and launches of pack: of one layer, of projections of one x, of a group.
#include <stdexcept>
#include <vector>

#include "device.h"
#include "launchers.h"
#include "ops.h"
#include "tensors.h"

namespace rasa_ext {
namespace {

// One layer's adapter: shapes checked, every tensor dense, B and B_pool by ranks.
struct Adapter {
  Tensor A, B;  // (own, in), (own, out)
  std::optional<Tensor> A_pool, B_pool, d;
  int in, out, own, pooled;
  int Rp;
};

// The kernels compute in float64 only where all is float64.
struct DTypes {
  DType asked, param, dtype;

  DTypes(const Tensor& A, torch::headeronly::ScalarType wanted) : asked(dtype_of(wanted)) {
    const bool wide = asked == DType::kFloat64 || dtype_of(A) == DType::kFloat64;
    param = wide ? DType::kFloat64 : dtype_of(A);
    dtype = wide ? DType::kFloat64 : asked;
  }
};

Adapter checked(const char* op, const Tensor& A, const std::optional<Tensor>& A_pool,
                const Tensor& B, const std::optional<Tensor>& B_pool,
                const std::optional<Tensor>& d, DType param, int64_t multiple) {
  const Checks checks(op, "A", A);
  checks.shape("A", A, {-1, -1});
  checks.like("B", B, {-1, A.size(0)});
  if (A_pool.has_value() != B_pool.has_value()) {
    checks.refuse("A_pool", "both pools or neither", A_pool ? "A_pool alone" : "B_pool alone");
  }
  if (multiple < 1) checks.refuse("multiple", "at least 1", std::to_string(multiple));
  const int64_t pooled = A_pool ? A_pool->size(0) : 0, rank = A.size(0) + pooled;
  Adapter adapter{dense(A, param),
                  dense(transposed(B), param),
                  {},
                  {},
                  {},
                  to_int("in_features", A.size(1)),
                  to_int("out_features", B.size(0)),
                  to_int("rank", A.size(0)),
                  to_int("pooled rank", pooled),
                  to_int("padded rank", (rank + multiple - 1) / multiple * multiple)};
  if (A_pool) {
    checks.like("A_pool", *A_pool, {-1, A.size(1)});
    checks.like("B_pool", *B_pool, {B.size(0), pooled});
    adapter.A_pool = dense(*A_pool, param);
    adapter.B_pool = dense(transposed(*B_pool), param);
  }
  if (d) {
    checks.like("d", *d, {rank});
    adapter.d = dense(*d, param);
  }
  return adapter;
}

PackLayer entry(const Adapter& adapter, void* Ap, void* Bp) {
  return {adapter.A.data_ptr(),
          data_of(adapter.A_pool),
          adapter.B.data_ptr(),
          data_of(adapter.B_pool),
          data_of(adapter.d),
          Ap,
          Bp,
          adapter.in,
          adapter.out,
          adapter.own,
          adapter.pooled,
          adapter.Rp};
}

void launch(const char* op, const Device& device, const Tensor& like,
            const std::vector<PackLayer>& layers, const DTypes& dtypes) {
  std::optional<Tensor> table;
  if (layers.size() > kLayersByValue) {
    table = device.upload(like, layers.data(), layers.size() * sizeof(PackLayer));
  }
  launch_pack(layers.data(), static_cast<const PackLayer*>(data_of(table)),
              static_cast<int>(layers.size()), dtypes.param, dtypes.dtype, device.stream());
  device.check_launch(op);
}

}  // namespace

std::tuple<Tensor, Tensor> pack(const Tensor& A, const std::optional<Tensor>& A_pool,
                                const Tensor& B, const std::optional<Tensor>& B_pool,
                                const std::optional<Tensor>& d, torch::headeronly::ScalarType dtype,
                                int64_t multiple) {
  const DTypes dtypes(A, dtype);
  const Device device(A);
  const Adapter adapter = checked("pack", A, A_pool, B, B_pool, d, dtypes.param, multiple);
  const Tensor Ap = empty(A, {adapter.Rp, adapter.in}, dtypes.dtype);
  const Tensor Bp = empty(A, {adapter.Rp, adapter.out}, dtypes.dtype);
  launch("pack", device, A, {entry(adapter, Ap.data_ptr(), Bp.data_ptr())}, dtypes);
  return {dense(Ap, dtypes.asked), dense(Bp, dtypes.asked)};
}

std::tuple<Tensor, Tensor> pack_group(const std::vector<Tensor>& A,
                                      const std::optional<Tensor>& A_pool,
                                      const std::vector<Tensor>& B,
                                      const std::optional<Tensor>& B_pool,
                                      const std::vector<Tensor>& d,
                                      torch::headeronly::ScalarType dtype, int64_t multiple) {
  const char* op = "pack_group";
  check_layers(op, "A", A.size(), "B", B.size());
  check_layers(op, "A", A.size(), "d", d.size());
  const DTypes dtypes(A[0], dtype);
  const Device device(A[0]);
  const Checks checks(op, "A[0]", A[0]);
  std::vector<Adapter> adapters;
  for (size_t i = 0; i < A.size(); ++i) {
    checks.like("A[i]", A[i], {A[0].size(0), A[0].size(1)});
    checks.like("B[i]", B[i], {B[0].size(0), B[0].size(1)});
    adapters.push_back(checked(op, A[i], A_pool, B[i], B_pool, d[i], dtypes.param, multiple));
  }
  const Adapter& first = adapters[0];
  const int64_t layers = static_cast<int64_t>(A.size());
  const Tensor Ap = empty(A[0], {layers, first.Rp, first.in}, dtypes.dtype);
  const Tensor Bp = empty(A[0], {layers, first.Rp, first.out}, dtypes.dtype);
  std::vector<PackLayer> table;
  for (int64_t i = 0; i < layers; ++i) {
    table.push_back(entry(adapters[i], layer_of(Ap, i).data_ptr(), layer_of(Bp, i).data_ptr()));
  }
  launch(op, device, A[0], table, dtypes);
  return {dense(Ap, dtypes.asked), dense(Bp, dtypes.asked)};
}

std::tuple<Tensor, std::vector<Tensor>> pack_projections(
    const std::vector<Tensor>& A, const std::vector<Tensor>& A_pool, const std::vector<Tensor>& B,
    const std::vector<Tensor>& B_pool, const std::vector<Tensor>& d,
    torch::headeronly::ScalarType dtype, int64_t multiple) {
  const char* op = "pack_projections";
  check_layers(op, "A", A.size(), "B", B.size());
  if (!A_pool.empty()) check_layers(op, "A", A.size(), "A_pool", A_pool.size());
  if (!B_pool.empty()) check_layers(op, "A", A.size(), "B_pool", B_pool.size());
  if (!d.empty()) check_layers(op, "A", A.size(), "d", d.size());
  const DTypes dtypes(A[0], dtype);
  const Device device(A[0]);
  const Checks checks(op, "A[0]", A[0]);
  const auto at = [](const std::vector<Tensor>& list, size_t i) {
    return list.empty() ? std::nullopt : std::optional<Tensor>(list[i]);
  };
  std::vector<Adapter> adapters;
  int64_t total = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    checks.like("A[i]", A[i], {-1, A[0].size(1)});
    adapters.push_back(
        checked(op, A[i], at(A_pool, i), B[i], at(B_pool, i), at(d, i), dtypes.param, multiple));
    total += adapters[i].Rp;
  }
  const Tensor Ap = empty(A[0], {to_int("padded rank", total), adapters[0].in}, dtypes.dtype);
  std::vector<Tensor> Bp;
  std::vector<PackLayer> table;
  int64_t row = 0;
  for (const Adapter& adapter : adapters) {
    Bp.push_back(empty(A[0], {adapter.Rp, adapter.out}, dtypes.dtype));
    void* rows = matrix_of(Ap).t().columns(row, adapter.Rp).data;
    table.push_back(entry(adapter, rows, Bp.back().data_ptr()));
    row += adapter.Rp;
  }
  launch(op, device, A[0], table, dtypes);
  for (Tensor& each : Bp) each = dense(each, dtypes.asked);
  return {dense(Ap, dtypes.asked), Bp};
}

}  // namespace rasa_ext
