"""A small model with module paths like diffusers' UNet2DConditionModel: several integers each."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x, context):
        keys = self.to_k(context).mean(-2, keepdim=True)
        return self.to_out[0](torch.tanh(self.to_q(x) * keys))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, 6)

    def forward(self, x):
        return self.attn2(x + self.attn1(x, x), x[..., :6])


class Stage(nn.Module):
    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, 1)
        self.attentions = nn.ModuleList(
            nn.ModuleDict({"transformer_blocks": nn.ModuleList([Block(width)])})
            for _ in range(blocks)
        )

    def forward(self, x):
        for each in self.attentions:
            x = x + each["transformer_blocks"][0](x)
        return x


class Unet(nn.Module):
    """Down, middle and up blocks with module paths like diffusers' UNet2DConditionModel."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Stage(8, 2), Stage(16, 2)])
        self.mid_block = Stage(16, 1)
        self.up_blocks = nn.ModuleList([Stage(16, 3), Stage(8, 3)])

    def forward(self, x):
        wide = self.mid_block(self.down_blocks[1](torch.cat([self.down_blocks[0](x), x], -1)))
        return self.up_blocks[1](self.up_blocks[0](wide)[..., :8])


ENDS = [f"attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_out.*")]


def by_end(name: str) -> str:
    return name.partition("transformer_blocks.0.")[2]


def groups_by(key) -> set[frozenset[str]]:
    """Return the sets of layers with equal ``key(name)`` and shape."""
    found: dict[object, set[str]] = {}
    for name, layer in Unet().named_modules():
        if isinstance(layer, nn.Linear):
            found.setdefault((key(name), layer.weight.shape), set()).add(name)
    return set(map(frozenset, found.values()))
