"""Train small models in one process, or in two that split a base by transformers' tp_plan.

torchrun --nproc-per-node 2 tests/workers/split.py DIRECTORY trains every case. The base must have
been saved by one process in DIRECTORY/base-CASE. The adapter and the results of ``train`` are
written to DIRECTORY/CASE, the results of ``loaded`` and ``refused`` to DIRECTORY.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rasa_ext
from rasa_ext.base_layers.sharded import is_dtensor
from rasa_ext.base_layers.sharded import whole as gathered
from tests.helpers.adapters import randomize
from tests.helpers.models import LLAMA, randomize_weights
from tests.helpers.processes import refuse_views
from tests.workers.training import assert_alike


def llama(**options) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {**LLAMA.make().config.to_dict(), **options}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    randomize_weights(model, torch.Generator().manual_seed(1))
    return model


def biased() -> nn.Module:
    """Build a Llama with biases, and with an odd width that two processes split unevenly."""
    return llama(attention_bias=True, mlp_bias=True, intermediate_size=41)


CASES = {
    "llama": (llama, torch.float64),
    "biased": (biased, torch.float64),
    "float32": (llama, torch.float32),
}
ENGINES = (*CASES, "torch's", "torch's, FSDP2")
"""The cases split by transformers, and "biased" by torch."""
MICRO = 2
CLIP = 0.01
# One pool for layers that are cut by rows and layers that are cut by columns.
GROUPS = {"square": ["q_proj", "o_proj"]}


def train(model: nn.Module) -> dict[str, Tensor]:
    """Train for three steps of two backwards each.

    Returns losses, gradient norms, and the first step's gradients by parameter name.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # AdamW divides by the size of gradients, so eps must be above their float32 rounding errors.
    optimizer = torch.optim.AdamW(trained.values(), 0.01, eps=1e-5)
    losses, norms = torch.zeros(2, 3, dtype=model.dtype)
    first: dict[str, Tensor] = {}
    for step in range(len(losses)):
        tokens = LLAMA.inputs(step)["input_ids"]
        for part in tokens.chunk(MICRO):
            logits = model(input_ids=part).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), part.flatten()) / MICRO
            loss.backward()
            losses[step] += loss.detach()
        first = first or {name: gathered(p.grad).clone() for name, p in trained.items()}
        norms[step] = gathered(nn.utils.clip_grad_norm_(trained.values(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, **first}


def whole(case: str) -> nn.Module:
    make, dtype = CASES[case]
    return make().to(dtype)


def adapted(base: nn.Module) -> nn.Module:
    model = rasa_ext.patch_model(
        base, 4, 1, groups=GROUPS, modules_to_save=["model.norm"], adapter_dtype=base.dtype
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def halved(directory: Path, case: str) -> nn.Module:
    """Load the base of a case, a half in each process."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        directory / f"base-{case}", distributed_config=config, dtype=CASES[case][1]
    )
    assert is_dtensor(model.model.layers[0].mlp.down_proj.weight)
    return model


def parallelized(how: str) -> nn.Module:
    """Split the base "biased" by torch's styles, adapt it, and shard it if ``how`` says so."""
    model, mesh = whole("biased"), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for block in model.model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
    model = adapted(model)
    randomize(model, 3)
    if "FSDP2" in how:
        for each in (*model.model.layers, model):
            fully_shard(each, mesh=mesh["dp"])
    return model


def step_of_peft(base: nn.Module) -> dict[str, Tensor]:
    """Return logits and gradients of a PEFT model with a randomized adapter."""
    import peft

    import rasa_ext.peft

    config = rasa_ext.peft.RasaConfig(r=4, rasa_k=1, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if dist.is_initialized():
        assert_alike(trained.values())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    logits = model(**LLAMA.inputs(0)).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in trained.items()}}


def loaded(directory: Path) -> None:
    """Load in two processes an adapter that one process saved, run it without grad, save it."""
    model = rasa_ext.load_adapter(halved(directory, "biased"), directory / "start").eval()
    with torch.no_grad():
        logits = [model(**LLAMA.inputs(0)).logits for _ in range(2)]  # the second reuses packs
    rasa_ext.save_adapter(model, directory / "again")
    if dist.get_rank() == 0:
        torch.save(logits, directory / "logits.pt")


def refused(directory: Path) -> None:
    """Write the errors of calls that must raise to refused.json."""
    said: dict[str, str] = {}

    def attempt(name, call) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    base = halved(directory, "float32")
    attempt("head", lambda: rasa_ext.patch_model(base, target_modules=["lm_head"]))
    model = rasa_ext.patch_model(base)
    attempt("merge", lambda: rasa_ext.merge(model))
    if dist.get_rank() == 0:
        (directory / "refused.json").write_text(json.dumps(said))


def finish(model: nn.Module, directory: Path) -> None:
    found = train(model)
    assert_alike(gathered(p) for p in model.parameters() if p.requires_grad)
    rasa_ext.save_adapter(model, directory)
    if dist.get_rank() == 0:
        torch.save(found, directory / "steps.pt")


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    refuse_views()
    for case in CASES:
        torch.manual_seed(dist.get_rank())  # the first process's values must win
        model = adapted(halved(directory, case))
        assert_alike(p for p in model.parameters() if p.requires_grad)
        randomize(model, 3)
        finish(model, directory / case)
    for how in ENGINES[len(CASES) :]:
        finish(parallelized(how), directory / how)
    torch.manual_seed(dist.get_rank())
    found = step_of_peft(halved(directory, "biased"))
    if dist.get_rank() == 0:
        torch.save(found, directory / "peft.pt")
    loaded(directory)
    refused(directory)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
