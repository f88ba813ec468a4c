"""Small models of many kinds, each with a factory, inputs and a loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.helpers import oracle


@dataclass(frozen=True)
class Entry:
    """A model and inputs for it.

    ``left_out`` names the linear layers that "all-linear" must not adapt. ``build`` is
    deterministic. Every dropout of the model is 0, so that train and eval mode agree.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], dict[str, Tensor]]
    call: Callable[..., Tensor]
    left_out: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        randomize_weights(model, torch.Generator().manual_seed(1))
        return model

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        drawn = self.draw(torch.Generator().manual_seed(seed))
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in drawn.items()
        }

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits, and the sum of their product with a fixed probe, exact in every dtype."""
        logits = self.call(model, **inputs)
        generator = torch.Generator().manual_seed(2)
        probe = torch.randint(-8, 9, logits.shape, generator=generator) / 8
        return logits, (logits * probe.to(logits)).sum()

    def targets(self, model: nn.Module) -> list[str]:
        """List the layers that "all-linear" must adapt in an unpatched ``model``."""
        return [
            name
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and name not in self.left_out
        ]


def randomize_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights large enough that every layer matters, small enough for stable gradients."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim > 1:
                parameter.copy_(noise * 0.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1 + noise * 0.1)


def _tokens(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, 32, shape, generator=generator)


def _sixteenths(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Return a function that draws multiples of 1/16 in [-2, 2], exact in every dtype."""
    return lambda generator: torch.randint(-32, 33, shape, generator=generator) / 16


def _inputs(**draws: Callable[[torch.Generator], Tensor]):
    return lambda generator: {key: draw(generator) for key, draw in draws.items()}


def _logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def _positional(model: nn.Module, x: Tensor, **others: Tensor) -> Tensor:
    return model(x, **others)


_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
_TEXT = {"vocab_size": 32, "max_position_embeddings": 32}


def _llama(layers: int = 3, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    more = {"num_hidden_layers": layers, "num_key_value_heads": 2, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_TEXT, **more, tie_word_embeddings=tied))


def _gpt2(layers: int = 3) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 24, "n_inner": 40, "n_head": 4}
    quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    more = {"n_layer": layers, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet, **more))


def _gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=32, **sizes, **heads, **special))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = {"num_hidden_layers": 2, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**_SIZES, **_TEXT, **quiet, **more))


def _t5(feed_forward: str = "gated-gelu", layers: int = 2) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 4}
    more = {"num_layers": layers, "num_decoder_layers": layers, "dropout_rate": 0.0}
    config = T5Config(**sizes, **more, feed_forward_proj=feed_forward, use_cache=False)
    return T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    more = {"num_hidden_layers": 2, "image_size": 12, "patch_size": 4, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**_SIZES, **more))


def _sequential() -> nn.Module:
    layers = [nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(10, 5, bias=False))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class AttentionHolder(nn.Module):
    """A model with nn.MultiheadAttention, which reads ``out_proj.weight`` but never calls it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.project = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x + self.attention(x, x, x, need_weights=False)[0])


class TwoNames(nn.Module):
    """One linear layer, registered under two names and called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))))


class TiedHead(nn.Module):
    """A head that shares the embedding's weight, with a name that no list of heads contains."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 12)
        self.body = nn.Linear(12, 12)
        self.readout = nn.Linear(12, 32, bias=False)
        self.readout.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.body(self.embed(x))))


class Experts(nn.Module):
    """Expert weights in one 3-D parameter."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 8))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        return torch.einsum("...e,...i,eio->...o", gates, x, self.down_proj)


class Mixture(nn.Module):
    """A linear layer, then a router and experts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.router = nn.Linear(8, 4)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        return self.experts(x, self.router(x).softmax(-1))


class Checkpointed(nn.Module):
    """A user-defined model: an embedding, then blocks under gradient checkpointing."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


CHECKPOINTED = Entry(
    "checkpointed", lambda: Checkpointed(False), _inputs(x=_tokens(4, 5)), _positional
)
_BATCH = {"input_ids": _tokens(8, 7)}

LLAMA = Entry("llama", _llama, _inputs(**_BATCH), _logits, ("lm_head",))
GPT2 = Entry("gpt2", _gpt2, _inputs(**_BATCH), _logits, ("lm_head",))
TIED_LLAMA = replace(LLAMA, name="tied-llama", make=functools.partial(_llama, tied=True))
GEMMA = replace(LLAMA, name="gemma", make=_gemma)
"""A model with scaled embeddings, a tied head and a padding token."""
BERT = Entry("bert", _bert, _inputs(**_BATCH), _logits, ("classifier",))
_PAIR = {"input_ids": _tokens(8, 7), "decoder_input_ids": _tokens(8, 5)}
T5 = Entry("t5", _t5, _inputs(**_PAIR), _logits, ("lm_head",))
T5_UNGATED = Entry("t5-ungated", lambda: _t5("gelu"), _inputs(**_PAIR), _logits, ("lm_head",))
VIT = Entry("vit", _vit, _inputs(pixel_values=_sixteenths(8, 3, 12, 12)), _logits, ("classifier",))

SEQUENTIAL = Entry("sequential", _sequential, _inputs(x=_sixteenths(5, 6)), _positional)
ENCODER = Entry("encoder", _encoder, _inputs(x=_sixteenths(3, 6, 16)), _positional)
ATTENTION = Entry("attention", AttentionHolder, _inputs(x=_sixteenths(2, 5, 12)), _positional)
TWO_NAMES = Entry("two-names", TwoNames, _inputs(x=_sixteenths(5, 8)), _positional)
TIED = Entry("tied", TiedHead, _inputs(x=_tokens(8, 7)), _positional, ("readout",))
EXPERTS = Entry("experts", Mixture, _inputs(x=_sixteenths(2, 8)), _positional, ("router",))

# The fewest layers that share a pool, since each costs compile time.
SHALLOW = tuple(
    replace(entry, make=functools.partial(entry.make, layers=layers))
    for entry, layers in ((LLAMA, 2), (GPT2, 2), (T5, 1))
)
FAMILIES = (LLAMA, GPT2, BERT, T5, T5_UNGATED, VIT)
OTHERS = (SEQUENTIAL, ENCODER, ATTENTION, TWO_NAMES, TIED)
EVERY = (*FAMILIES, *OTHERS)


def ids(entry: Entry) -> str:
    return entry.name


@torch.no_grad()
def logits(entry: Entry, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute a model's logits for the entry's first inputs, in eval mode."""
    return entry.loss(model.eval(), entry.inputs(0, dtype))[0]


def rounding(entry: Entry, model: nn.Module) -> float:
    """Return ``oracle.rounding`` of a model's logits for the entry's first inputs."""
    return oracle.rounding(model, lambda m: logits(entry, m, next(m.parameters()).dtype))
