"""GRPO with a real vLLM server that receives only the adapter, as it is saved, at every step."""

import pytest
import torch
from transformers import AutoTokenizer

import rasa_ext
from examples.served_adapter import ServedAdapter
from rasa_ext.commands.models import load_model
from rasa_ext.serving.vllm import POOLS
from tests.helpers.lora_server import log_probabilities
from tests.helpers.trainers import QUIET
from tests.readers.conftest import TEXTS, fill
from tests.readers.likeliest import LIMIT
from tests.readers.servers import served as serving

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.readers
SYNCS = 20


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_the_server_computes_with_what_was_just_trained(
    case, plugin, tmp_path, figure, record_property
):
    words = ["vllm", "serve", str(case.base), "--dtype", "float32", "--max-model-len", "256"]
    words += ["--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    settings = {**QUIET, "max_steps": 2, "learning_rate": 1e-3, "bf16": False}
    settings |= {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}
    model = rasa_ext.patch_model(load_model(str(case.gguf)), rank=8, k=1)
    fill(model, 0)
    told, before, moved = [], [], []

    def rollout(prompts, trainer):
        found = served.rollout(prompts, trainer)
        for prompt, tokens, those in zip(*found.values(), strict=True):
            expected = of_tokens(model, prompt, tokens)
            told.append((torch.tensor(those) - expected).abs().max().item())
        if before:  # the error if the server still had the last adapter
            moved.append((of_tokens(model, *before[-1][:2]) - before[-1][2]).abs().max().item())
        before.append((prompt, tokens, expected))
        return found

    with serving("vllm", words, tmp_path / "log", **plugin, **{POOLS: "shared"}) as post:
        post("/tokenize", {"prompt": "it is up"})
        served = ServedAdapter(post.address, tmp_path / "adapters")
        trainer = trl.GRPOTrainer(
            model,
            # Rewards always differ, so that every step changes the adapter.
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=trl.GRPOConfig(str(tmp_path / "out"), **settings),
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in TEXTS]),
            processing_class=AutoTokenizer.from_pretrained(case.base),
            rollout_func=rollout,
            callbacks=[served],
        )
        trainer.train()
        rollout(TEXTS[:2], trainer)
        for step in range(3, SYNCS):
            fill(model, step)
            served.send(model, step)
            rollout(TEXTS[step % 2 : step % 2 + 2], trainer)
    (sent,) = (tmp_path / "adapters").rglob("*.safetensors")
    record_property("vLLM, GRPO that sends it the adapter at every step", max(told))
    figure(f"vLLM, GRPO: off {max(told):.1e}, moved by a step {min(moved):.1e}")
    figure(f"a sync of GRPO: {sent.stat().st_size / 1e6:.1f} MB")
    assert len(told) == SYNCS * 2
    assert sent.stat().st_size < 10e6
    assert max(told) < LIMIT, told
    assert min(moved) > 30 * LIMIT, moved


def of_tokens(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the log-probability of each token of a completion."""
    logits = log_probabilities(model, prompt + tokens)[len(prompt) - 1 : -1]
    return logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
