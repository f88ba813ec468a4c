"""Random walks of code that takes a model apart and knows nothing of adapters.

The model has an encoder, a decoder and a head. After every operation the logits equal the float64
model with W + dW from the tensors of that moment. A LoRA by PEFT walks the same way: it says what
users may expect.
"""

import copy
import io

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle

SEEDS = st.integers(0, 3)
PARTS = st.sampled_from(["encoder", "decoder", "lm_head"])
STACKS = st.sampled_from(["encoder", "decoder"])
START = 0


def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    more = {"num_layers": 2, "dropout_rate": 0.0, "initializer_factor": 2.0}
    config = T5Config(
        **sizes, **more, tie_word_embeddings=False, decoder_start_token_id=START, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # it was tied
    return model


def tokens(seed: int, rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, 30, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    labels = tokens(7, len(ids), 3) if labels is None else labels
    return model(input_ids=ids, decoder_input_ids=labels).logits


def changes(model: nn.Module) -> dict[str, Tensor]:
    """Return dW of every adapted layer in float64, from the tensors alone."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, rasa_ext.RasaLinear):
            own, pool = layer.own_tensors(), layer.pool_tensors()
        elif hasattr(layer, "rasa_A"):
            adapter = layer.named("default")
            own, pool = adapter.own, adapter.pool
        elif hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            own, pool = {"A": A, "B": B, "d": A.new_full((len(A),), layer.scaling["default"])}, {}
        else:
            continue
        A = torch.cat([t["A"].detach().double() for t in (own, pool) if t])
        B = torch.cat([t["B"].detach().double() for t in (own, pool) if t], 1)
        found[name] = (B * own["d"].detach().double()) @ A
    return found


class Walk(RuleBasedStateMachine):
    """Operations on parts of ``self.net``, the T5 inside of ``self.model``."""

    model: nn.Module

    def adapt(self, base: nn.Module) -> nn.Module:
        raise NotImplementedError

    @property
    def net(self) -> nn.Module:
        return self.model

    @property
    def head(self) -> nn.Linear:
        return self.net.lm_head

    @initialize()
    def begin(self):
        self.model = self.adapt(network())
        self.draw(self.trained(), 1)

    def trained(self, part: nn.Module | None = None) -> list[nn.Parameter]:
        return [p for p in (part or self.model).parameters() if p.requires_grad]

    @torch.no_grad()
    def draw(self, parameters: list[nn.Parameter], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.1 * noise + (parameter.dim() == 1))

    def plain(self, dtype: torch.dtype) -> nn.Module:
        base = network().double()
        for name, change in changes(self.net).items():
            base.get_submodule(name).weight.data += change
        base.lm_head.weight.data = self.head.weight.detach().double()
        return base.to(dtype)

    def check(self, found: Tensor, run, part: str = "") -> None:
        """Check a result against ``run`` of the plain model, or of a part of that."""
        wide, narrow = (self.plain(dtype) for dtype in (torch.float64, torch.float32))
        with torch.no_grad(), oracle.in_float64():
            expected = run(wide.get_submodule(part))
        with torch.no_grad():
            error = (run(narrow.get_submodule(part)) - expected).abs().max().item()
        # A missed tensor moves results a thousand times as far as one draw of rounding does.
        oracle.assert_close(found.detach(), expected, error, times=64)

    def check_logits(self, seed: int) -> None:
        with torch.no_grad():
            found = logits(self.model, tokens(seed))
        self.check(found, lambda model: logits(model, tokens(seed)))

    def loss(self, seed: int) -> Tensor:
        return logits(self.model.train(), tokens(seed)).log_softmax(-1)[..., 3].mean()

    def step(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.model.zero_grad()
        self.loss(seed).backward()
        optimizer.step()
        self.model.eval()

    @rule(seed=SEEDS)
    def optimizer_by_part(self, seed):
        """Every trained parameter belongs to one part, and moves."""
        parts = [self.net.encoder, self.net.decoder, self.net.lm_head]
        groups = [
            {"params": self.trained(part), "lr": 0.01 * (i + 1)} for i, part in enumerate(parts)
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            return
        mine = [parameter for group in groups for parameter in group["params"]]
        assert {id(p) for p in mine} == {id(p) for p in self.trained()}
        before = [parameter.detach().clone() for parameter in mine]
        self.step(torch.optim.AdamW(groups), seed)
        moved = [not torch.equal(p, old) for p, old in zip(mine, before, strict=True)]
        assert all(moved)
        self.check_logits(seed)

    @rule(part=PARTS, seed=SEEDS)
    def frozen(self, part, seed):
        """A frozen part stays as it is while the others train."""
        part = self.net.get_submodule(part)
        flags = {p: p.requires_grad for p in part.parameters()}
        part.requires_grad_(False)
        before = copy.deepcopy(part.state_dict())
        if trained := self.trained():
            self.step(torch.optim.AdamW(trained, lr=0.01), seed)
        assert all(torch.equal(tensor, before[key]) for key, tensor in part.state_dict().items())
        self.check_logits(seed)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    @rule(part=STACKS, seed=SEEDS)
    def momentum_copy(self, part, seed):
        """A copied part follows by its parameters, in order, and computes what the part does."""
        online = self.net.get_submodule(part)
        target = copy.deepcopy(online)
        self.draw(self.trained(online), seed)
        with torch.no_grad():
            for parameter, source in zip(target.parameters(), online.parameters(), strict=True):
                parameter.lerp_(source, 1.0)
        self.check_part(target, part, seed)
        self.check_logits(seed)

    def check_part(self, module: nn.Module, part: str, seed: int) -> None:
        """Check that a module computes what the model's ``part`` should."""
        with torch.no_grad():
            found = self.call(module, seed)
        self.check(found, lambda plain: self.call(plain, seed), part)

    def call(self, part: nn.Module, seed: int) -> Tensor:
        ids = tokens(seed)
        others = {}
        if part.config.is_decoder:
            generator = torch.Generator().manual_seed(seed)
            hidden = torch.randn(2, 4, 16, generator=generator)
            others = {"encoder_hidden_states": hidden.to(part.embed_tokens.weight.dtype)}
        return part(input_ids=ids, **others).last_hidden_state

    @rule(part=STACKS, seed=SEEDS)
    def part_alone(self, part, seed):
        self.check_part(self.net.get_submodule(part), part, seed)

    @rule(part=STACKS, through_file=st.booleans(), seed=SEEDS)
    def state_of_a_part(self, part, through_file, seed):
        """The state of a part, loaded strictly into another model's, carries all that it is."""
        state = self.net.get_submodule(part).state_dict()
        if through_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other = self.adapt(network())
        inner = other.base_model.model if hasattr(other, "peft_config") else other
        inner.get_submodule(part).load_state_dict(state, strict=True)
        self.check_part(inner.get_submodule(part), part, seed)

    @rule(part=PARTS, seed=SEEDS)
    def swap_of_averages(self, part, seed):
        """Evaluate averages that are written through ``.data``, then go back."""
        self.check_logits(seed)
        parameters = self.trained(self.net.get_submodule(part))
        kept = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.copy_(parameter.detach() * 0.5)
        self.check_logits(seed)
        self.generate(seed)
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.data.copy_(old)
        self.generate(seed)

    @rule(seed=SEEDS)
    def generate(self, seed):
        """Compare the logits of every generated token with a forward over all tokens so far."""
        ids = tokens(seed)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        self.check(
            torch.stack(made.logits, 1), lambda model: logits(model, ids, made.sequences[:, :-1])
        )

    @rule(rows=st.integers(1, 3), length=st.integers(1, 2), seed=SEEDS)
    def odd_shapes(self, rows, length, seed):
        ids, labels = tokens(seed, rows, length), tokens(seed + 1, rows, 1)
        with torch.no_grad():
            found = logits(self.model, ids, labels)
        self.check(found, lambda model: logits(model, ids, labels))

    @rule(part=STACKS, seed=SEEDS)
    def moved_part(self, part, seed):
        """Cast a part to float64 and back, which replaces memory, and move it to another device."""
        module = self.net.get_submodule(part).double()
        self.check_part(module, part, seed)
        self.check_part(module.float().to("cpu"), part, seed)
        self.check_logits(seed)

    @rule(part=STACKS, seed=SEEDS)
    def replaced_part(self, part, seed):
        """Put a copy of a part in the part's place, and train on."""
        setattr(self.net, part, copy.deepcopy(self.net.get_submodule(part)))
        self.check_logits(seed)
        if trained := self.trained():
            self.step(torch.optim.SGD(trained, lr=0.05), seed)
        self.check_logits(seed)

    @rule(seed=SEEDS)
    def perturbed(self, seed):
        """Move along one direction and back, as gradients of zeroth order do."""
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(p.shape, generator=generator) for p in self.trained()]
        for scale in (0.1, -0.2, 0.1):
            for parameter, direction in zip(self.trained(), noise, strict=True):
                parameter.data.add_(scale * direction)
            self.check_logits(seed)

    @precondition(lambda self: self.trained())
    @rule(part=PARTS)
    def norms_of_parts(self, part):
        """Norms of gradients by part make up the norm of the whole."""
        self.model.zero_grad()
        self.loss(1).backward()
        self.model.eval()
        parts = [self.net.encoder, self.net.decoder, self.net.lm_head]
        squares = [p.grad.square().sum() for part in parts for p in self.trained(part)]
        whole = torch.nn.utils.clip_grad_norm_(self.trained(), 1e9)
        torch.testing.assert_close(torch.stack(squares).sum().sqrt(), whole)


class Patched(Walk):
    def adapt(self, base):
        return rasa_ext.patch_model(base, rank=3, k=1, modules_to_save=["lm_head"]).eval()


class Peft(Walk):
    def adapt(self, base):
        return get_peft_model(base, RasaConfig(r=3, rasa_k=1, modules_to_save=["lm_head"])).eval()

    @property
    def net(self):
        return self.model.base_model.model

    @property
    def head(self):
        return self.net.lm_head.modules_to_save["default"]


class Lora(Peft):
    def adapt(self, base):
        config = LoraConfig(r=3, target_modules="all-linear", modules_to_save=["lm_head"])
        return get_peft_model(base, config).eval()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("walk", [Patched, Peft, Lora])
def test_random_walks(walk, request):
    run_state_machine_as_test(
        walk,
        settings=settings(
            max_examples=max(1, request.config.getoption("walks") // 10),
            stateful_step_count=12,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
