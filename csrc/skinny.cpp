#include "skinny.h"

#include <torch/csrc/stable/ops.h>

#include "blas.h"
#include "dropout.h"
#include "heuristics.h"
#include "launchers.h"

namespace rasa_ext {
namespace {

// Whether each row's elements are contiguous.
bool by_rows(const Matrix& matrix) { return matrix.col_stride == 1 || matrix.cols <= 1; }

// Runs the kernels if they support the products, and returns whether they ran.
bool launched(const Device& device, const Tensor& S, const std::optional<Tensor>& bits,
              const std::optional<Down>& down, const std::optional<Grad>& grad) {
  const Matrix wide = matrix_of(S), P = down ? matrix_of(down->P) : Matrix{};
  const Matrix D = down ? down->D : Matrix{}, Q = grad ? grad->Q : Matrix{};
  if (!use_skinny(wide.rows) || !by_rows(wide) || (down && !(by_rows(P) && by_rows(D))) ||
      (grad && !by_rows(Q))) {
    return false;
  }
  SkinnyCall call{wide.data, wide.row_stride, static_cast<const uint8_t*>(data_of(bits))};
  call.M = to_int("tokens", wide.rows);
  call.N = to_int("features", wide.cols);
  call.Rp = to_int("rank", down ? P.rows : Q.cols);
  call.P = P.data, call.P_stride = P.row_stride;
  call.D = D.data, call.D_stride = D.row_stride;
  call.Q = Q.data, call.Q_stride = Q.row_stride;
  call.C = grad ? grad->C.data : nullptr;
  call.scale = down ? down->scale : 1;
  const DType dtype = dtype_of(S);
  if (!skinny_fits(call, dtype)) return false;
  const Tensor workspace = empty_bytes(S, skinny_workspace(call));
  call.workspace = workspace.data_ptr();
  launch_skinny(call, dtype, device.stream());
  device.check_launch("skinny");
  return true;
}

}  // namespace

void multiply_narrow(const Device& device, const Tensor& S, const std::optional<Tensor>& mask,
                     const std::optional<Down>& down, const std::optional<Grad>& grad) {
  if (!down && !grad) return;
  const std::optional<Tensor> bits =
      mask ? std::optional(torch::stable::contiguous(*mask)) : std::nullopt;
  if (launched(device, S, bits, down, grad)) return;
  const Blas blas = device.blas();
  const Tensor kept = kept_of(device, S, mask);
  const Matrix seen = matrix_of(kept);
  if (down) {
    const Tensor P = gemm_operand(down->P);
    gemm(blas, multiply(seen, matrix_of(P).t(), down->D, false, down->scale));
  }
  if (grad) gemm(blas, multiply(grad->Q.t(), seen, grad->C, false));
}

}  // namespace rasa_ext
