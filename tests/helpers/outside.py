"""Two methods defined outside the package: VeRA, and one with an index tensor in each layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rasa_ext import methods
from rasa_ext.methods import Factors, LayerSpec


@dataclasses.dataclass(frozen=True)
class VeraConfig(methods.AdapterConfig):
    """VeRA (arXiv 2310.11454): dW = diag(b) B diag(d) A, with frozen, shared A and B."""

    method: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "2310.11454"

    rank: int = methods.option(8, "The rank of the A and B that a group shares, as drawn.")
    d_initial: float = 0.1

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        zeros = torch.zeros(spec.out_features, device=spec.device)
        d = torch.full((self.rank,), self.d_initial, device=spec.device)
        return {"b": nn.Parameter(zeros), "d": nn.Parameter(d)}

    def group_tensors(self, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
        out, width = specs[0].out_features, specs[0].in_features
        A, B = torch.empty(self.rank, width), torch.empty(out, self.rank)
        for each in (A, B):
            nn.init.kaiming_uniform_(each)
        return {"A": A.to(specs[0].device), "B": B.to(specs[0].device)}

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec) -> Factors:
        return Factors(pool["A"], None, own["b"][:, None] * pool["B"], None, own["d"])


@dataclasses.dataclass(frozen=True)
class PickedConfig(methods.AdapterConfig):
    """dW = B A[index]: every layer picks r of 2 r rows of A."""

    method: ClassVar[str] = "picked"

    rank: int = 2

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        if self.rank > spec.in_features:
            raise ValueError(f"rank: expected at most {spec.in_features}, got {self.rank}.")
        return {
            "A": methods.fresh_A(2 * self.rank, spec, self.adapter_dtype),
            "B": methods.fresh_B(self.rank, spec, self.adapter_dtype),
            "index": torch.arange(0, 2 * self.rank, 2, device=spec.device),
        }

    def factors(self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec) -> Factors:
        return Factors(own["A"].index_select(0, own["index"]), None, own["B"], None, None)
