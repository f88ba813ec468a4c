// Host functions of the operators. rasa_ext/ops/ documents shapes and contracts.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace rasa_ext {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> pack_group(const std::vector<Tensor>& A,
                                      const std::optional<Tensor>& A_pool,
                                      const std::vector<Tensor>& B,
                                      const std::optional<Tensor>& B_pool,
                                      const std::vector<Tensor>& d,
                                      torch::headeronly::ScalarType dtype, int64_t multiple);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_group_backward(
    const std::vector<Tensor>& dAp, const std::vector<Tensor>& dBp, const std::vector<Tensor>& B,
    const std::optional<Tensor>& B_pool, const std::vector<Tensor>& d);

std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& Ap,
                                           const Tensor& Bp, const std::optional<Tensor>& mask,
                                           double scale);

std::tuple<Tensor, Tensor> low_rank_add(const Tensor& y, const Tensor& x, const Tensor& Ap,
                                        const Tensor& Bp, const std::optional<Tensor>& mask,
                                        double scale);

std::tuple<Tensor, Tensor, Tensor> low_rank_linear_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& U, const Tensor& Ap, const Tensor& Bp, bool need_x, bool need_A,
    bool need_B, const std::optional<Tensor>& mask, double scale);

std::tuple<std::vector<Tensor>, Tensor> linear_projections(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
    const Tensor& Ap, const std::vector<Tensor>& Bp, const std::optional<Tensor>& mask,
    double scale);

std::tuple<Tensor, Tensor, std::vector<Tensor>> linear_projections_backward(
    const std::vector<Tensor>& grads, const std::optional<Tensor>& x,
    const std::vector<Tensor>& weights, const std::optional<Tensor>& U, const Tensor& Ap,
    const std::vector<Tensor>& Bp, bool need_x, bool need_A, bool need_B,
    const std::optional<Tensor>& mask, double scale);

Tensor dropout(const Tensor& noise, const Tensor& x, double p);

Tensor delta_group(const Tensor& Ap, const Tensor& Bp);

void merge_group(const std::vector<Tensor>& weights, const Tensor& Ap, const Tensor& Bp);

std::tuple<Tensor, Tensor> linear_group(const Tensor& x, const std::vector<Tensor>& weights,
                                        const std::optional<Tensor>& bias, const Tensor& Ap,
                                        const Tensor& Bp);

std::tuple<Tensor, Tensor, Tensor> linear_group_backward(const Tensor& grad, const Tensor& x,
                                                         const std::vector<Tensor>& weights,
                                                         const Tensor& U, const Tensor& Ap,
                                                         const Tensor& Bp, bool need_x,
                                                         bool need_adapter);

}  // namespace rasa_ext
