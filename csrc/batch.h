// Products of all layers of a group in one call: batches by stride and by pointer.
#pragma once

#include <optional>
#include <vector>

#include "device.h"
#include "gemm.h"
#include "tensors.h"

namespace rasa_ext {

// One matrix a layer at a fixed distance; at distance 0 one matrix that all layers read.
struct Batch {
  Matrix first;
  int64_t stride = 0;

  Batch t() const { return {first.t(), stride}; }
  // The same from layer `layer` on.
  Batch from(int64_t layer) const;
};

// The layers of a (L, rows, cols) tensor.
Batch layers_of(const Tensor& stacked);

// A (rows, cols) tensor for every layer.
inline Batch for_all_layers(const Tensor& matrix) { return {matrix_of(matrix), 0}; }

// The stacked tensor if GEMMs can read its layers as they lie in the dtype, else a copy.
Tensor batch_operand(const Tensor& stacked, DType dtype);

// D_l = A_l B_l, + D_l if `add`, for `layers` layers.
GemmCall multiply(const Batch& a, const Batch& b, const Batch& d, bool add, int layers);

// One matrix a layer, anywhere in memory, all lying like the first one.
struct Scattered {
  Matrix like;
  std::vector<void*> pointers;

  Scattered t() const { return {like.t(), pointers}; }
};

// Whether a GEMM can read or write all matrices, and they lie alike. cuBLAS, which cannot see where
// a batch's pointers lead, wants them at 16 bytes for halves and TF32 (cublasGemmBatchedEx).
bool lie_alike(const std::vector<Tensor>& matrices);

// Whether the layers of a batch lie at 16 bytes.
bool is_aligned(const Batch& batch, int layers);

// Expects lie_alike.
Scattered scattered(const std::vector<Tensor>& matrices);

// The layers of a batch.
Scattered scattered(const Batch& batch, int layers);

// The call for D_l = A_l B_l, + D_l if `add`, for gemm_pointers. Its pointers stand in `table`, on
// the device of `on`, which the caller keeps until the call is made.
GemmCall multiply(const Device& device, const Tensor& on, const Scattered& a, const Scattered& b,
                  const Scattered& d, bool add, std::optional<Tensor>& table);

}  // namespace rasa_ext
