// Attaches the kernels to the schemas of rasa_ext/ops/, which must be loaded first.
#include <torch/csrc/stable/library.h>

#include "ops.h"

// Tests register the same host code under another name, for CPU tensors.
#ifndef RASA_EXT_NAMESPACE
#define RASA_EXT_NAMESPACE rasa_ext
#define RASA_EXT_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(RASA_EXT_NAMESPACE, RASA_EXT_DISPATCH_KEY, m) {
  m.impl("pack_group", TORCH_BOX(&rasa_ext::pack_group));
  m.impl("pack_group_backward", TORCH_BOX(&rasa_ext::pack_group_backward));
  m.impl("low_rank_linear", TORCH_BOX(&rasa_ext::low_rank_linear));
  m.impl("low_rank_add", TORCH_BOX(&rasa_ext::low_rank_add));
  m.impl("low_rank_linear_backward", TORCH_BOX(&rasa_ext::low_rank_linear_backward));
  m.impl("linear_projections", TORCH_BOX(&rasa_ext::linear_projections));
  m.impl("linear_projections_backward", TORCH_BOX(&rasa_ext::linear_projections_backward));
  m.impl("dropout", TORCH_BOX(&rasa_ext::dropout));
  m.impl("delta_group", TORCH_BOX(&rasa_ext::delta_group));
  m.impl("merge_group", TORCH_BOX(&rasa_ext::merge_group));
  m.impl("linear_group", TORCH_BOX(&rasa_ext::linear_group));
  m.impl("linear_group_backward", TORCH_BOX(&rasa_ext::linear_group_backward));
}
