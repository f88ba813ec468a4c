"""GRPO with a server that receives only the adapter and computes with it."""

import types

import pytest
import torch
from transformers import TrainerCallback

import rasa_ext
from examples import served_adapter
from examples.served_adapter import ServedAdapter, ServerError
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import patched, randomize, same_bits
from tests.helpers.lora_server import log_probabilities, serving
from tests.helpers.peft import tiny
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums
from tests.helpers.trainers import QUIET

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")

TOKENS = list(range(3, 40))
LOAD, UNLOAD, COMPLETE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions")


@pytest.fixture
def server():
    with serving(make_model()) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(served_adapter.time, "sleep", lambda seconds: None)


def off(server, served, model) -> float:
    """Return the largest difference in log-probabilities of server and trainer.

    It is divided by the server's own error, which computes in plain PyTorch.
    """
    dense, call = server.loras[served.served], lambda model: log_probabilities(model, TOKENS)
    return (call(dense) - call(model)).abs().max().item() / oracle.rounding(dense, call)


class Check(TrainerCallback):
    """A callback that compares served and trained adapter at every sync and rollout."""

    def __init__(self, server, served):
        self.server, self.served = server, served
        self.names, self.off, self.told = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.names.append(self.served.served)
        self.off.append(off(self.server, self.served, model))

    on_step_end = on_train_begin

    def rollout(self, prompts, trainer):
        found = self.served.rollout(prompts, trainer)
        for prompt, completion, told in zip(*found.values(), strict=True):
            logits = log_probabilities(trainer.model, prompt + completion)
            expected = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
            error = oracle.rounding(
                self.server.loras[self.served.served],
                lambda model, tokens=prompt + completion: log_probabilities(model, tokens),
            )
            self.told.append((torch.tensor(told) - expected[:, 0]).abs().max().item() / error)
        return found


def grpo(model, directory, served, check, peft_config=None, chat=False, **options):
    settings = {**QUIET, "max_steps": 3, "learning_rate": 1e-2, "bf16": False}
    settings |= {"num_generations": 2, "max_completion_length": 4, **options}
    prompts = [row["prompt"] for row in sums(8)]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(str(c)))) for c in completions],
        args=trl.GRPOConfig(str(directory / "out"), **settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        rollout_func=check.rollout,
        callbacks=[served, check],
    )


# Model and config, whether prompts are conversations, and TRL's weight of the KL term (beta).
FRONT_ENDS = {
    "patched": (lambda: (patched(make_model()), None), True, 0.0),
    "a config": (lambda: (make_model(), RasaConfig(r=4, task_type="CAUSAL_LM")), False, 0.1),
    "a trained adapter": (lambda: (tiny(), None), False, 0.1),
}


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_sync_serves_what_is_trained(front_end, server, tmp_path, figure):
    make, chat, beta = FRONT_ENDS[front_end]
    model, config = make()
    served = ServedAdapter(server.address, tmp_path / "adapters")
    check = Check(server, served)
    trainer = grpo(model, tmp_path, served, check, config, chat, beta=beta)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    figure(
        f"served, {front_end}: {max(check.off):.1f} x plain PyTorch's own error, rollouts "
        f"{max(check.told):.1f} x"
    )
    assert len(check.told) == 3 * 4
    assert max(check.off) <= 8
    assert max(check.told) <= 8
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad or same_bits(parameter.detach(), before[name]), name
    # One adapter per sync, each asked only for its step's completions; the last one remains.
    assert len(set(check.names)) == len(check.names) == 4
    asked = [body["model"] for path, body in server.requests if path == COMPLETE]
    assert asked == check.names[:3]
    assert list(server.loras) == check.names[3:] == [served.served]
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == check.names[3:]
    order = [path for path, _ in server.requests]
    assert order == [LOAD, COMPLETE] + [LOAD, UNLOAD, COMPLETE] * 2 + [LOAD, UNLOAD]


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_as_seldom_as_is_asked(server, tmp_path):
    """With two updates per generation, every second update and the last one are sent."""
    served = ServedAdapter(server.address, tmp_path / "adapters", every=2, name="mine")
    check = Check(server, served)
    trainer = grpo(patched(make_model()), tmp_path, served, check, num_iterations=2)
    trainer.train()
    steps = [body["lora_name"].rsplit("-", 1) for path, body in server.requests if path == LOAD]
    assert [step for _, step in steps] == ["0", "2", "3"]
    assert {name.partition("-")[0] for name, _ in steps} == {"mine"}
    assert off(server, served, trainer.model) <= 8


@pytest.mark.parametrize("path", [LOAD, UNLOAD, None])
def test_an_answer_that_is_lost_is_no_refusal(path, server, tmp_path):
    """Nor is a server that was started anew, and has no adapter to unload."""
    model, served = patched(make_model()), ServedAdapter(server.address, tmp_path)
    server.lost = [path] if path else []
    served.send(model, 0)
    if path is None:
        server.loras.clear()
    name = served.send(model, 1)
    assert list(server.loras) == [name]
    assert not server.lost


def test_a_refusal_leaves_what_was_served(server, tmp_path):
    model, served = patched(make_model()), ServedAdapter(server.address, tmp_path)
    name = served.send(model, 0)
    server.max_rank = 4
    with pytest.raises(ServerError, match=r"refused /v1/load_lora_adapter with 400.*rank 5 is gre"):
        served.send(model, 1)
    assert served.served == name
    assert list(server.loras) == [name] == [path.name for path in tmp_path.iterdir()]


def test_no_server(tmp_path):
    with serving(make_model()) as gone:
        served = ServedAdapter(gone.address, tmp_path, tries=2)
    with pytest.raises(ServerError, match=r"did not answer /v1/load_lora_adapter .*2 times.*vLLM"):
        served.send(patched(make_model()), 0)
    assert served.served is None
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_cannot_be_written(server, tmp_path, monkeypatch):
    model, served = patched(make_model()), ServedAdapter(server.address, tmp_path)
    name = served.send(model, 0)

    def fail(model, folder, **_):
        (folder / "adapter_config.json").write_text("{")
        raise OSError("no space")

    monkeypatch.setattr(rasa_ext, "save_adapter", fail)
    with pytest.raises(OSError, match="no space"):
        served.send(model, 1)
    assert served.served == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path for path, _ in server.requests] == [LOAD]


def test_other_processes_are_told_the_name(server, tmp_path, monkeypatch):
    def broadcast(names):
        names[0] = "rasa-of-the-first"

    monkeypatch.setattr(served_adapter, "broadcast_object_list", broadcast)
    served = ServedAdapter(server.address, tmp_path)
    state = types.SimpleNamespace(is_world_process_zero=False, global_step=0)
    served.on_train_begin(None, state, None, model=make_model())
    assert served.served == "rasa-of-the-first"
    assert not server.requests
    assert not list(tmp_path.iterdir())


def test_a_rollout_without_the_callback(server, tmp_path):
    with pytest.raises(RuntimeError, match="callbacks: expected this ServedAdapter"):
        ServedAdapter(server.address, tmp_path).rollout(["a"], None)


def test_a_server_that_tells_no_tokens(server, tmp_path, monkeypatch):
    served = ServedAdapter(server.address, tmp_path)
    served.send(patched(make_model()), 0)
    monkeypatch.setattr(server, "complete", lambda body: {"choices": [{"index": 0, "text": "a"}]})
    args = trl.GRPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = types.SimpleNamespace(args=args, processing_class=make_tokenizer())
    with pytest.raises(ServerError, match="return token_ids, as vLLM does, got 1 choices"):
        served.rollout(["a"], trainer)


@pytest.mark.parametrize("argument", ["every", "tries"])
def test_counts_below_one(argument):
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
        ServedAdapter("http://localhost", "adapters", **{argument: 0})


def test_the_adapter_that_is_named(server, tmp_path):
    model = tiny()
    model.add_adapter("other", RasaConfig(r=6, rasa_k=2))
    model.set_adapter("other")
    randomize(model, 9)
    served = ServedAdapter(server.address, tmp_path, adapter_name="other")
    served.send(model, 0)
    assert off(server, served, model) <= 8
