"""RaSA's configuration in PEFT's form, under the field names of the official code."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig

from rasa_ext import methods
from rasa_ext._version import __version__
from rasa_ext.methods.base import ALL_LINEAR, AdapterConfig, checked_dtype, groups_to_json
from rasa_ext.methods.keywords import check_keywords
from rasa_ext.methods.token_indices import tokens_to_json
from rasa_ext.peft.peft_type import RASA

# A field here, and its name in the configs of rasa_ext.
_CORE_NAMES = {
    "r": "rank",
    "rasa_k": "k",
    "rasa_alpha": "alpha",
    "rasa_dropout": "dropout",
    "rasa_groups": "groups",
    "rank_pattern": "rank_pattern",
    "rasa_gates": "gates",
    "rasa_experts": "experts",
    "rasa_rslora": "rslora",
}
_NAME = re.compile(r"[\w.-]+")
_REFUSED = {"rasa_stack": "boosters", "rasa_kept": "the ranks that pruning left"}
_METHODS = {name: each for name, each in methods.every_method().items() if each.trained}
_HELP = {
    field.name: field.metadata["help"]
    for config in reversed(_METHODS.values())
    for field in dataclasses.fields(config)
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RasaConfig(PeftConfig):
    """The config of one RaSA adapter under PEFT. Each field's ``metadata["help"]`` explains it.

    The fields are those of ``rasa_ext.RasaConfig`` under the official code's names, r for rank,
    and PEFT's own. A layer of weight (out, in) gets dW = [B | B_pool] diag(d) [A ; A_pool] of rank
    r-k+L*k, the pool being shared by the L layers of one name and shape (arXiv 2503.12576,
    section 3).

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.

    Example:
        >>> import peft, rasa_ext.peft
        >>> config = rasa_ext.peft.RasaConfig(r=8, rasa_k=1, rasa_alpha=32.0)
        >>> model = peft.get_peft_model(model, config)
        >>> all("rasa_" in name for name, p in model.named_parameters() if p.requires_grad)
        True
    """

    r: int = _option(8, _HELP["rank"])
    rasa_k: int | None = _option(None, _HELP["k"])
    rasa_alpha: float = _option(8.0, _HELP["alpha"])
    rasa_dropout: float = _option(0.0, _HELP["dropout"])
    target_modules: list[str] | set[str] | str | None = _option(
        ALL_LINEAR, f"{_HELP['target_modules']} None is the same as 'all-linear'."
    )
    exclude_modules: list[str] | set[str] | str | None = _option(None, _HELP["exclude_modules"])
    layers_to_transform: list[int] | int | None = _option(
        None, "Indices of the layers to adapt; the others stay out of the pool, too."
    )
    layers_pattern: list[str] | str | None = _option(
        None, "Names before a layer's index, with layers_to_transform only."
    )
    modules_to_save: list[str] | None = _option(None, _HELP["modules_to_save"])
    trainable_token_indices: Any = _option(None, _HELP["trainable_token_indices"])
    rasa_groups: Any = _option(None, _HELP["groups"])
    rasa_method: str = _option(
        "rasa",
        "The method: rasa or lora. rasa_k and the four fields below are for the one whose config "
        "in rasa_ext.methods has them. rasa_ext.patch_model has more methods.",
    )
    rank_pattern: dict[str, int] | None = _option(None, _HELP["rank_pattern"])
    rasa_gates: str | None = _option(None, _HELP["gates"])
    rasa_experts: str | None = _option(
        None,
        f"{_HELP['experts']} Under lora 'own' gives each a pair of its own. Also taken under the "
        "name experts.",
    )
    rasa_rslora: bool | None = _option(None, _HELP["rslora"])
    bias: str = _option("none", "Only 'none': the files of an adapter have no place for biases.")
    fan_in_fan_out: bool = _option(
        False,
        "Whether weights are (in, out), as those of Conv1D. Read off the layers; what is given is "
        "replaced by what was found.",
    )
    init_weights: bool = _option(
        True,
        "Whether B starts at zero, so that the model computes what its base does. False draws it: "
        "for tests.",
    )
    adapter_dtype: str = _option("float32", _HELP["adapter_dtype"])
    rasa_ext_version: str | None = _option(None, "The version that wrote the file; leave empty.")
    experts: dataclasses.InitVar[str | None] = None  # rasa_experts, by the name that the core has
    rasa_stack: dataclasses.InitVar[Any] = None  # in files that PEFT cannot have, and these are
    rasa_kept: dataclasses.InitVar[Any] = None  # refused

    def __new__(cls, *args: Any, **kwargs: Any) -> RasaConfig:
        """Make a config; TypeError, with the name that was meant, for a field it does not have."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_keywords(cls.__name__, kwargs, [*known, "experts", *_REFUSED])
        made: RasaConfig = super().__new__(cls)
        return made

    def __post_init__(self, experts: str | None, rasa_stack: Any, rasa_kept: Any) -> None:
        """Check every field and bring it into PEFT's form."""
        for name, value in zip(_REFUSED, (rasa_stack, rasa_kept), strict=True):
            if value:
                raise ValueError(
                    f"{name}: PEFT has no place for {_REFUSED[name]}; rasa_ext.load_adapter(model, "
                    "directory) reads the adapter, and rasa_ext.export_lora then writes a LoRA."
                )
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's has no types
        if experts is not None and self.rasa_experts not in (None, experts):
            raise ValueError(
                f"experts: expected one name of rasa_experts, got both, experts={experts!r} and "
                f"rasa_experts={self.rasa_experts!r}."
            )
        self.rasa_experts = self.rasa_experts if experts is None else experts
        self.peft_type = RASA
        self.rasa_ext_version = self.rasa_ext_version or __version__
        if isinstance(self.adapter_dtype, torch.dtype):
            self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        if self.target_modules is None:
            self.target_modules = ALL_LINEAR
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
                setattr(self, name, set(value))
        if self.bias != "none":
            raise ValueError(
                f"bias: expected 'none', got {self.bias!r}; trained biases are not supported."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: works with target_modules as a list of name suffixes, got "
                f"{self.target_modules!r}; a regular expression can name the layers itself."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: {self.layers_pattern!r} says nothing without "
                "layers_to_transform; give both or none."
            )
        core = self.core()
        pattern = self.layers_pattern or ()
        for name in (*core.modules_to_save, *([pattern] if isinstance(pattern, str) else pattern)):
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"modules_to_save, layers_pattern: expected names of modules, got {name!r}, "
                    "which PEFT would take for a regular expression."
                )
        self.rasa_k = getattr(core, "k", None)
        self.trainable_token_indices = tokens_to_json(core.tokens)
        if not callable(core.layer_groups):
            self.rasa_groups = groups_to_json(core.layer_groups)

    def to_dict(self) -> dict[str, Any]:
        """Give the config as the values of ``adapter_config.json``.

        Raises ValueError where ``rasa_groups`` is a callable that no model has been given to.
        """
        if callable(self.rasa_groups):
            groups_to_json(self.rasa_groups)
        settings: dict[str, Any] = super().to_dict()
        return settings

    def core(self) -> AdapterConfig:
        """Give the same choices as ``rasa_ext.patch_model`` takes them."""
        if self.rasa_method not in list(_METHODS):
            other = methods.every_method().get(str(self.rasa_method))
            hint = other and (
                ", whose tensors or steps of training have no place in PEFT; use "
                f"rasa_ext.patch_model(model, config=rasa_ext.methods.{other.__name__}(...))"
            )
            raise ValueError(
                f"rasa_method: expected one of {', '.join(_METHODS)}, got {self.rasa_method!r}"
                f"{hint or ''}."
            )
        config = _METHODS[self.rasa_method]
        fields = {field.name for field in dataclasses.fields(config)}
        given = {core: getattr(self, name) for name, core in _CORE_NAMES.items()}
        kept = {core: value for core, value in given.items() if core == "k" or value is not None}
        for name, core in _CORE_NAMES.items():
            if given[core] is not None and core not in fields:
                raise ValueError(f"{name}: the method {self.rasa_method!r} has no such field.")
        try:
            return config(
                target_modules=ALL_LINEAR if self.target_modules is None else self.target_modules,
                exclude_modules=self.exclude_modules or (),
                modules_to_save=self.modules_to_save or (),
                trainable_token_indices=self.trainable_token_indices,
                adapter_dtype=checked_dtype("adapter_dtype", self.adapter_dtype),
                **{core: value for core, value in kept.items() if core in fields},
            )
        except (TypeError, ValueError) as error:
            core_name, _, text = str(error).partition(":")
            ours = {core: name for name, core in _CORE_NAMES.items()}
            raise type(error)(f"{ours.get(core_name, core_name)}:{text}") from None


RasaConfig.experts = property(lambda self: self.rasa_experts)
