"""export_lora of a PEFT model writes the same file as for a patched model."""

import json

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file

import rasa_ext
from rasa_ext.peft import RasaConfig, export_lora
from tests.helpers import experts as mixtures
from tests.helpers.adapters import content, randomize, same_tensors
from tests.helpers.peft import adapted, logits, named, tiny, two
from tests.helpers.peft_sides import needs_experts
from tests.helpers.tiny_lm import make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*modules_to_save", "ignore:.*SGLang")


def of_the_package(model, directory, base=None, **options):
    """Export through the package: save the PEFT adapter, load and export it."""
    model.save_pretrained(directory / "adapter")
    patched = rasa_ext.load_adapter(make_model() if base is None else base, directory / "adapter")
    return rasa_ext.export_lora(patched, directory / "expected", **options)


ROWS = {"trainable_token_indices": [5, 30]}
ADAPTERS = [{}, {"rasa_k": 0}, {"rasa_k": 4}, {"modules_to_save": ["lm_head"]}, ROWS]
FORMS = [{"rank": 2}, {"format": "mlx"}, {"rank": 16}]


@pytest.mark.parametrize(
    ("adapter", "form"), [(each, {}) for each in ADAPTERS] + [({}, each) for each in FORMS], ids=str
)
def test_the_same_bytes(adapter, form, tmp_path):
    model, options = tiny(**adapter), {**form, "allow_dropped": adapter is ROWS}
    rank = of_the_package(model, tmp_path, **options)
    assert export_lora(model, tmp_path / "lora", **options) == rank
    assert content(tmp_path / "lora") == content(tmp_path / "expected")
    if form.get("rank") == 16:
        assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"] == 16


@pytest.mark.parametrize("merged", [False, True])
def test_one_of_several_active_or_not(merged, tmp_path):
    model = two()
    if merged:
        model.merge_adapter()
    export_lora(model, tmp_path, "second")
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert len(written) == 2 * len(named(model, "second"))
    if merged:
        model.unmerge_adapter()
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@needs_experts
@pytest.mark.parametrize("layout", ["peft", "per-expert"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_adapted_experts(family, layout, tmp_path):
    base = mixtures.model(family)
    model = adapted(base, r=4, rasa_k=1, rasa_experts="shared", task_type="CAUSAL_LM")
    rank = of_the_package(model, tmp_path, base, expert_layout=layout)
    assert export_lora(model, tmp_path / "lora", expert_layout=layout) == rank
    assert content(tmp_path / "lora") == content(tmp_path / "expected")


def test_layers_without_a_peft_model(tmp_path):
    model = inject_adapter_in_model(RasaConfig(r=4, rasa_k=1), make_model())
    randomize(model, 3)
    export_lora(model, tmp_path / "a")
    export_lora(tiny(r=4, rasa_k=1, seed=3), tmp_path / "b")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert same_tensors(a, b)


def test_what_is_refused(tmp_path):
    for model, name in ((tiny(), "other"), (make_model(), "default")):
        with pytest.raises(ValueError, match="adapter_name: expected one of"):
            export_lora(model, tmp_path / "lora", name)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        export_lora("model", tmp_path / "lora")
    with pytest.raises(ValueError, match="expert_layout: expected a model with adapted experts"):
        export_lora(tiny(), tmp_path / "lora", expert_layout="peft")
    assert not (tmp_path / "lora").exists()
