"""PEFT on the device: two adapters, training, files."""

import copy

import torch
from peft import PeftModel, get_peft_model

from rasa_ext.peft import RasaConfig
from tests.gpu.steps import check_model
from tests.helpers.adapters import RANK
from tests.helpers.models import LLAMA
from tests.helpers.peft import TOKENS, close, dense, plain, two
from tests.helpers.tiny_lm import make_model


def test_a_step(device, fused):
    base = LLAMA.build().to(device)
    model = get_peft_model(copy.deepcopy(base), RasaConfig(r=RANK, rasa_k=1)).train()
    check_model(LLAMA, base, plain(model), model)


def test_two_adapters(device, tmp_path):
    """Two adapters are right one at a time and together, with and without grad, and from files."""
    model, tokens = two().to(device), TOKENS.to(device)
    twin = copy.deepcopy(model).cpu()
    names = ("default", "second")
    expected = {name: dense(twin, name) for name in names}
    for context in (torch.enable_grad, torch.no_grad):
        for name in names:
            model.set_adapter(name)
            with context():
                close(model(tokens).logits.cpu(), expected[name])
    model.base_model.set_adapter(list(names))
    close(model(tokens).logits.cpu(), dense(twin, *names))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model().to(device), tmp_path).eval()
    loaded.load_adapter(tmp_path / "second", "second")
    for name in names:
        model.set_adapter(name)
        loaded.set_adapter(name)
        found = loaded(tokens).logits
        assert found.device.type == device
        assert torch.equal(found, model(tokens).logits)
