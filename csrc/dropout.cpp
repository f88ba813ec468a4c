#include "dropout.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "launchers.h"
#include "ops.h"

namespace rasa_ext {
namespace {

void launch(const Device& device, const Tensor& x, const Tensor& mask, const Tensor& x_dropped) {
  const Tensor bits = torch::stable::contiguous(mask);
  launch_keep(x.data_ptr(), static_cast<const uint8_t*>(bits.data_ptr()), x_dropped.data_ptr(),
              x.numel(), dtype_of(x), device.stream());
  device.check_launch("keep");
}

}  // namespace

Tensor dropout(const Tensor& noise, const Tensor& x, double p) {
  const Checks checks("dropout", "x", x);
  checks.shape("x", x, {-1, -1});
  checks.integers("noise", noise, 2, torch::headeronly::ScalarType::Long);
  if (!(p >= 0 && p < 1)) checks.refuse("p", "a number in [0, 1)", std::to_string(p));
  const Device device(x);
  const Tensor words = torch::stable::contiguous(noise);
  const Tensor mask = empty_mask(x, dropout_mask_bytes(x.numel()));
  launch_dropout(static_cast<const uint64_t*>(words.data_ptr()),
                 static_cast<uint8_t*>(mask.data_ptr()), x.numel(), p, device.stream());
  device.check_launch("dropout");
  return mask;
}

void check_mask(const Checks& checks, const std::optional<Tensor>& mask, int64_t elements) {
  if (!mask) return;
  checks.integers("mask", *mask, dropout_mask_bytes(elements), torch::headeronly::ScalarType::Byte);
}

Tensor kept_of(const Device& device, const Tensor& x, const std::optional<Tensor>& mask) {
  if (!mask) return gemm_operand(x);
  const Tensor source = dense(x, dtype_of(x)),
               x_dropped = empty(x, {x.size(0), x.size(1)}, dtype_of(x));
  launch(device, source, *mask, x_dropped);
  return x_dropped;
}

void keep_in_place(const Device& device, Tensor& x, const Tensor& mask) {
  launch(device, x, mask, x);
}

}  // namespace rasa_ext
