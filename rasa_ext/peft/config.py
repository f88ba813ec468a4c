"""RaSA's config in PEFT's form, with the field names of the official code."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from rasa_ext import methods
from rasa_ext._version import __version__
from rasa_ext.checkpoint.card import CARD_LINE
from rasa_ext.checkpoint.files import check_files
from rasa_ext.methods.base import ALL_LINEAR, BIASES, AdapterConfig, groups_to_json, key_of
from rasa_ext.methods.keywords import check_keywords
from rasa_ext.methods.token_indices import tokens_to_json
from rasa_ext.peft.callers import users_level
from rasa_ext.peft.peft_type import RASA

# Fields that rasa_ext.RasaConfig also has, and their names there.
_CORE_NAMES = {key_of(each.name): each.name for each in dataclasses.fields(methods.RasaConfig)}
_NAME = re.compile(r"[\w.-]+")
_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(methods.RasaConfig)}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _shared(name: str, more: str = "", default: Any = None) -> Any:
    """Make a field that ``rasa_ext.RasaConfig`` has as ``name``, with the help text from there."""
    return _option(default, f"{_HELP[name]} {more}".rstrip())


class _Patterns(dict[str, int]):
    """A ``rank_pattern`` that is false, so that PEFT leaves it alone: its ``re`` may never end."""

    def __bool__(self) -> bool:
        return False


@dataclass
class RasaConfig(PeftConfig):
    """Config of one RaSA adapter under PEFT. Each field's ``metadata["help"]`` explains it.

    The fields are PEFT's own, and the fields of ``rasa_ext.RasaConfig`` under the official code's
    names, such as r for rank. A layer with weight (out, in) gets dW = [B | B_pool] diag(d)
    [A ; A_pool] of rank r-k+L*k. The L layers of one name and shape share the pool (arXiv
    2503.12576, section 3). ``rasa_method`` selects another method than RaSA. ``rasa_options`` has
    the fields of that method's config that are missing here.

    Raises:
        TypeError, ValueError: a field is wrong; the message says what was expected and what came.

    Example:
        >>> import peft, rasa_ext.peft
        >>> config = rasa_ext.peft.RasaConfig(r=8, rasa_k=1, rasa_alpha=32.0)
        >>> model = peft.get_peft_model(model, config)
        >>> all("rasa_" in name for name, p in model.named_parameters() if p.requires_grad)
        True
    """

    r: int | None = _shared("rank", "None is the method's default, 8 under rasa.")
    rasa_k: int | None = _shared("k")
    rasa_alpha: float | None = _shared("alpha")
    rasa_start: str | None = _shared("start", "None is 'lora'.")
    rasa_dropout: float = _shared("dropout", default=0.0)
    target_modules: list[str] | set[str] | str | None = _shared(
        "target_modules", "None means 'all-linear'.", ALL_LINEAR
    )
    exclude_modules: list[str] | set[str] | str | None = _shared("exclude_modules")
    layers_to_transform: list[int] | int | None = _option(
        None,
        "Indices of the layers to adapt; other layers do not share the pool either. As a model is "
        "adapted, target_modules becomes the names of the chosen layers, which every reader knows.",
    )
    layers_pattern: list[str] | str | None = _option(
        None, "Names before a layer's index in module names; needs layers_to_transform."
    )
    modules_to_save: list[str] | None = _shared("modules_to_save")
    trainable_token_indices: Any = _shared("trainable_token_indices")
    rasa_groups: Any = _shared("groups")
    rasa_method: str = _option(
        "rasa",
        "The method: rasa, lora, or another method of rasa_ext.methods that needs only an "
        "optimizer to train, including methods that your code or an installed package defines.",
    )
    rasa_options: dict[str, Any] | None = _option(
        None,
        "Fields of the method's config in rasa_ext.methods that are missing here, by name, such as "
        '{"rslora": True} under lora. Files prefix the names, as in rasa_rslora.',
    )
    rank_pattern: dict[str, int] | None = _shared("rank_pattern")
    rasa_experts: str | None = _shared("experts", "Under lora, 'own' trains one pair per expert.")
    bias: str = _option(
        "none",
        "Which biases of the base are trained and saved: none, all, or 'rasa_only', those of the "
        "adapted layers. They stay in the base when the adapter is disabled or unloaded.",
    )
    fan_in_fan_out: bool = _option(
        False,
        "Whether weights are (in, out), as in Conv1D. It is determined from the layers, which "
        "overrides a given value.",
    )
    init_weights: bool = _option(
        True,
        "Whether B starts at zero, so that the untrained model equals its base. False draws random "
        "values, for tests.",
    )
    adapter_dtype: str = _shared("adapter_dtype", default="float32")
    rasa_template: bool = _shared("template", default=True)
    rasa_ext_version: str | None = _option(None, "The version that wrote the file; leave empty.")

    def __post_init__(self) -> None:
        """Check every field and convert it to PEFT's form."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's has no types
        self.peft_type = RASA
        self.rasa_ext_version = self.rasa_ext_version or __version__
        if isinstance(self.adapter_dtype, torch.dtype):
            self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        if self.target_modules is None:
            self.target_modules = ALL_LINEAR
        core = self.core()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
                setattr(self, name, set(value))
        if self.bias not in BIASES:
            raise ValueError(f"bias: expected one of {', '.join(BIASES)}, got {self.bias!r}.")
        expression = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if self.layers_to_transform is not None and expression:
            raise ValueError(
                "layers_to_transform: expected target_modules as a list of name suffixes, got "
                f"{self.target_modules!r}; a regular expression can select layers itself."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: {self.layers_pattern!r} has no effect without "
                "layers_to_transform; pass both or neither."
            )
        pattern = self.layers_pattern or ()
        for name in (*core.modules_to_save, *([pattern] if isinstance(pattern, str) else pattern)):
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"modules_to_save, layers_pattern: expected names of modules, got {name!r}, "
                    "which PEFT would treat as a regular expression."
                )
        for name in ("r", "rasa_k", "rasa_alpha", "rasa_start"):
            setattr(self, name, getattr(core, _CORE_NAMES[name], None))
        self.rank_pattern = self.rank_pattern and _Patterns(self.rank_pattern)
        self.trainable_token_indices = tokens_to_json(core.tokens)
        if not callable(core.layer_groups):
            self.rasa_groups = groups_to_json(core.layer_groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as the content of ``adapter_config.json``.

        Raises ValueError if ``rasa_groups`` is a callable that no model has resolved.
        """
        written = self.core().to_dict()
        settings: dict[str, Any] = super().to_dict()
        if self.rank_pattern is not None:
            settings["rank_pattern"] = dict(self.rank_pattern)  # json would write a false one as {}
        keys = {f"rasa_{name}" for name in settings.pop("rasa_options") or ()}
        return settings | {key: value for key, value in written.items() if key in keys}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, and into PEFT's card that a reader needs this package."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory, "README.md")
        text = path.read_text(encoding="utf-8") if path.is_file() else CARD_LINE
        if CARD_LINE not in text:
            head, title, rest = text.partition("\n# ")
            path.write_text(f"{head}\n{CARD_LINE}\n{title}{rest}", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Read a config as PEFT does, which would wait for a pipe in the place of the weights."""
        check_files(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def of(cls, config: AdapterConfig, **more: Any) -> RasaConfig:
        """Return PEFT's config for one of ``rasa_ext.methods``; ``more`` are PEFT's own fields."""
        fields = {field.name for field in dataclasses.fields(config)}
        names = {name: core for name, core in _CORE_NAMES.items() if core in fields}
        given: dict[str, Any] = {name: getattr(config, core) for name, core in names.items()}
        for name in ("modules_to_save", "exclude_modules", "target_modules"):
            if isinstance(given[name], tuple):  # PEFT extends lists
                given[name] = list(given[name]) or None
        options = {name: getattr(config, name) for name in _options(type(config))}
        return cls(rasa_method=config.method, **given, rasa_options=options or None, **more)

    def why_not_trained(self) -> str:
        """Return why PEFT cannot train the method, or "" if it can. It can read every method."""
        method = methods.method_named(self.rasa_method, "rasa_method")
        hooks = ("learning_rates", "callbacks")
        own = [name for name in hooks if getattr(method, name) is not getattr(AdapterConfig, name)]
        loop = method.loop and f"its training needs {method.loop}"
        return method.peft or loop or (f"PEFT does not call its {' and '.join(own)}" if own else "")

    def core(self) -> AdapterConfig:
        """Return the config that ``rasa_ext.patch_model`` takes for these settings."""
        config = methods.method_named(self.rasa_method, "rasa_method")
        fields, options = {field.name for field in dataclasses.fields(config)}, _options(config)
        given: dict[str, Any] = {"k": None} if config is methods.RasaConfig else {}
        for name, core in _CORE_NAMES.items():
            if (value := getattr(self, name)) is not None:
                given[core] = value
                if core not in fields:
                    raise ValueError(f"{name}: the method {self.rasa_method!r} has no such field.")
        if not isinstance(self.rasa_options, dict | None):
            raise TypeError(
                "rasa_options: expected a dict of fields of the method's config, got "
                f"{type(self.rasa_options).__name__}."
            )
        for name in self.rasa_options or ():
            if name not in options:
                raise ValueError(
                    f"rasa_options: expected fields of the method {self.rasa_method!r} "
                    f"({', '.join(options) or 'it has no others'}), got {name!r}."
                )
        try:
            return config(**given, **(self.rasa_options or {}))
        except (TypeError, ValueError) as error:
            core_name, _, text = str(error).partition(":")
            ours = {core: name for name, core in _CORE_NAMES.items()}
            ours |= {name: f"rasa_options: {name}" for name in options}
            raise type(error)(f"{ours.get(core_name, core_name)}:{text}") from None


def _options(config: type[AdapterConfig]) -> list[str]:
    """List the fields of a method's config that go into ``rasa_options``."""
    return [f.name for f in dataclasses.fields(config) if f.name not in _CORE_NAMES.values()]


def _takes_options(init: Callable[..., None]) -> Callable[..., None]:
    """Let ``__init__`` also take a method's options by the names that files use."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def takes(self: RasaConfig, *args: Any, **given: Any) -> None:
        method = methods.method_named(given.get("rasa_method", "rasa"), "rasa_method")
        keys = {key: name for name in _options(method) if (key := f"rasa_{name}") not in known}
        if options := {keys[key]: given.pop(key) for key in keys if key in given}:
            given["rasa_options"] = {**(given.get("rasa_options") or {}), **options}
        unknown = sorted(given.keys() - known)
        self.is_from_file = "peft_type" in given
        if self.is_from_file:
            given = {**{key_of(name): value for name, value in method.absent.items()}, **given}
        if unknown and self.is_from_file:
            # PEFT would drop the options, which are not in the signature.
            warnings.warn(
                f"adapter_config.json: {', '.join(unknown)} ignored; a newer rasa_ext may have "
                "written the file.",
                stacklevel=users_level(),
            )
            given = {key: value for key, value in given.items() if key in known}
        check_keywords("RasaConfig", given, [*known, *keys])
        init(self, *args, **given)

    return takes


RasaConfig.__init__ = _takes_options(RasaConfig.__init__)  # type: ignore[method-assign]  # wrapped
