"""Operators, each with a schema and a PyTorch kernel. Compiled code only adds kernels.

Each file holds one family. The rest of the package calls only the functions of this module.
"""

from rasa_ext.ops.dropout import dropout
from rasa_ext.ops.experts import (
    experts_linear,
    experts_outer,
    experts_rank_multiple,
    pack_experts_backward,
)
from rasa_ext.ops.fused_projections import linear_projections, linear_projections_backward
from rasa_ext.ops.heuristics import (
    differentiates_products,
    fuse_projections,
    noise_words,
    rank_multiple,
)
from rasa_ext.ops.layers import delta_group, linear_group, linear_group_backward, merge_group
from rasa_ext.ops.library import COMPILED, COMPOSED, OPERATORS, accumulation_dtype, cuda_status
from rasa_ext.ops.linear import (
    linear,
    linear_add,
    low_rank_add,
    low_rank_linear,
    low_rank_linear_backward,
)
from rasa_ext.ops.pack import (
    Factors,
    differentiable_pack,
    pack_group,
    pack_group_backward,
    unpack_group,
)
