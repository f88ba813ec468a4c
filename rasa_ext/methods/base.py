"""AdapterConfig: a method, defined by a config class."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from rasa_ext.methods.keywords import check_keywords
from rasa_ext.methods.patterns import check_pattern
from rasa_ext.methods.token_indices import GivenTokens, Tokens, checked_tokens, tokens_to_json
from rasa_ext.nn.adapter import LayerSpec
from rasa_ext.ops import Factors

if TYPE_CHECKING:
    from transformers import TrainerCallback

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "rasa_only")
"""Which of the base's biases PEFT trains and saves."""
OFFICIAL = "rasa"
"""The method of files without a method name, as the official code writes them."""
MOST_RANKS, MOST_POOLED = 1 << 16, 1 << 31
"""More ranks than any layer or pool has: a file with a larger number is damaged."""
_LARGEST = 1e308  # the limit for a float, but not for an integer
_ALWAYS = ("rank", "k", "alpha")
"""Fields that a file always has, since the official code writes them."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Names = str | Collection[str]
"""A regular expression, or name suffixes, which a config stores as a tuple."""

Groups = tuple[tuple[str, tuple[str, ...]], ...] | Callable[[str], str | None]
"""Which layers share a pool, as a config stores it: group names with patterns of layer names, or a
callable from a layer's name to a group's name."""

Counts = tuple[tuple[str, int], ...] | Mapping[str, int]
"""A number for some layers, by name, which a config stores as pairs."""

GivenGroups = Groups | Mapping[str, str | Sequence[str]] | Sequence[str] | None
"""``Groups`` as users give them."""


def option(default: Any, text: str, counts: int = 0) -> Any:
    """Return a field of a config, with ``text`` as ``metadata["help"]``.

    ``counts`` is not 0 for a mapping from names to that many counts of ranks. Such a mapping is an
    object in files and pairs in the config.
    """
    return dataclasses.field(default=default, metadata={"help": text, "counts": counts})


class Rate(NamedTuple):
    """Factors on the optimizer's settings for one of a layer's tensors."""

    lr: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float = 1.0
    eps: float = 1.0
    """Factor on Adam's epsilon."""


METHODS: dict[str, type[AdapterConfig]] = {}
"""Every defined method, by the name in files and on the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The base class of configs; ``metadata["help"]`` explains each field.

    A method is a subclass with a name. It defines the tensors of a layer and of a group, and how
    they make up the factors of dW = [B | B_pool] diag(d) [A ; A_pool] = Bp^T Ap. Other changes,
    such as DoRA, IA3 or OFT, are not possible. Defining the class registers the method. An
    installed package announces methods by the entry-point group ``rasa_ext.methods``.

    Raises:
        TypeError, ValueError: the message names the field, what was expected and what was given.
    """

    method: ClassVar[str]
    """The method's name, in files and on the command line."""
    title: ClassVar[str] = ""
    """The method's name in text; by default ``method``."""
    paper: ClassVar[str] = ""
    """The paper's number on arXiv."""
    loop: ClassVar[str] = ""
    """How to train the method, if an optimizer is not enough; ``rasa-ext sft`` shows it."""
    peft_type: ClassVar[str] = "RASA"
    """The type of all methods in PEFT."""
    peft: ClassVar[str] = ""
    """Why PEFT cannot train the method, if not for ``loop`` or a hook that PEFT does not call."""
    absent: ClassVar[Mapping[str, Any]] = {}
    """Values of fields that a file lacks, where they are not the defaults."""

    dropout: float = option(0.0, "Dropout on the adapter's input in training, in [0, 1).")
    target_modules: Names = option(
        ALL_LINEAR,
        "'all-linear' (every linear layer except output heads and routers), a sequence of name "
        "suffixes, or a string: a regular expression that matches whole module names.",
    )
    exclude_modules: Names = option(
        (), "Layers to leave out of the targets: name suffixes, or a regular expression."
    )
    modules_to_save: Collection[str] = option(
        (), "Name suffixes of modules that are trained in full and saved with the adapter."
    )
    trainable_token_indices: GivenTokens = option(
        (),
        "Tokens with trained embedding rows, for example new tokens: a list for the model's input "
        "embedding, or a mapping from name suffixes of embeddings or linear heads to lists. "
        "Trained rows replace rows of the base. A head that shares the embedding's weight shares "
        "the trained rows.",
    )
    groups: GivenGroups = option(
        (),
        "Which layers share a pool. By default, layers share one if their shapes are equal and "
        "their names differ only in the layer index, the first integer that varies. To choose "
        "other groups: a sequence of patterns, one for each group; a mapping from group names to "
        "patterns; or a callable from a layer's name to a group's name, saved as the mapping that "
        "it returned. A pattern is the end of a layer's name, and '*' in it stands for one part of "
        "the name. Layers of different shapes never share a pool, and layers that match no pattern "
        "follow the default.",
    )
    adapter_dtype: torch.dtype = option(
        torch.float32,
        "Dtype of the trainable parameters. Computation casts them to the activations' dtype; "
        "bfloat16 here saves memory but rounds away small optimizer steps.",
    )

    template: bool = dataclasses.field(
        default=True,
        compare=False,
        metadata={
            "help": "Whether the adapter was trained on the model's chat template; the commands "
            "evaluate and generate then ask through it."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register a method by name; raise ValueError if another method has the name."""
        super().__init_subclass__(**kwargs)
        if "method" not in vars(cls):
            return
        before = METHODS.setdefault(cls.method, cls)
        if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"method: expected a name that no other method has, got {cls.method!r}, the name "
                f"of {before.__module__}.{before.__qualname__}."
            )
        METHODS[cls.method] = cls
        cls.title = vars(cls).get("title") or cls.method

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        """Make a config; raise TypeError for an unknown field, suggesting a known one."""
        check_keywords(cls.__name__, kwargs, [field.name for field in dataclasses.fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field and convert it to the canonical form.

        Of a subclass's fields, this checks ``rank``, ``alpha``, booleans and mappings from names to
        counts.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    got = f"{value!r} ({type(value).__name__})"
                    raise TypeError(f"{field.name}: expected True or False, got {got}.")
            elif field.name in _CHECKS:
                self._set(**{field.name: _CHECKS[field.name](value)})
            elif field.metadata.get("counts") == 1:
                self._set(**{field.name: checked_counts(field.name, value)})
        dropout = checked_number("dropout", self.dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}.")
        targets = _names("target_modules", self.target_modules, regex=True)
        if not targets:
            raise ValueError(
                "target_modules: expected 'all-linear', a sequence of name suffixes or a regular "
                f"expression, got an empty {type(self.target_modules).__name__}."
            )
        saved = self.modules_to_save
        self._set(
            dropout=dropout,
            target_modules=targets,
            exclude_modules=_names("exclude_modules", self.exclude_modules, regex=True),
            modules_to_save=_names(
                "modules_to_save", (saved,) if isinstance(saved, str) else saved
            ),
            trainable_token_indices=checked_tokens(self.trainable_token_indices),
            groups=checked_groups(self.groups),
            adapter_dtype=checked_dtype("adapter_dtype", self.adapter_dtype),
        )

    @property
    def layer_groups(self) -> Groups:
        """``groups``, after the check."""
        return cast(Groups, self.groups)

    @property
    def tokens(self) -> Tokens:
        """``trainable_token_indices``, after the check."""
        return cast(Tokens, self.trainable_token_indices)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def grouping_of_experts(self) -> str | None:
        """Which experts share a pool, or None if stacked experts are not adapted.

        By default this is the field ``experts``, if the method has one.
        """
        return getattr(self, "experts", None)

    def check_layers(self, names: Collection[str]) -> None:
        """Raise ValueError if a field names layers but matches no adapted layer."""

    def layer_tensors(self, spec: LayerSpec) -> dict[str, Tensor]:
        """Make one layer's tensors by name: trained Parameters, and buffers.

        All shapes depend on ``spec`` only. The device of ``spec`` may be meta.
        """
        raise NotImplementedError

    def group_tensors(self, specs: Sequence[LayerSpec]) -> dict[str, Tensor]:
        """Make a group's tensors, which the model owns; by default none."""
        return {}

    def begin(
        self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: LayerSpec, weight: Tensor
    ) -> None:
        """Set a new adapter's tensors from the base's weight, in place; by default nothing.

        Called without grad for every layer of a new adapter, not of a loaded one. The base must not
        be changed: put the product that PiSSA subtracts into tensors that are no Parameters, which
        files have as well.

        Args:
            own: the layer's tensors by name.
            pool: the group's tensors by name.
            spec: the layer.
            weight: W (out, in), or (experts, out, in), dequantized; float32, or float64 over
                float64.
        """

    def factors(
        self, own: Mapping[str, Tensor], pool: Mapping[str, Tensor], spec: LayerSpec
    ) -> Factors:
        """Return the factors of one layer, differentiable in ``own`` and ``pool``.

        By default the factors are the tensors named A, B and d.
        """
        return Factors(own["A"], pool.get("A"), own["B"], pool.get("B"), own.get("d"))

    def learning_rates(self, spec: LayerSpec) -> dict[str, Rate]:
        """Return the rates, by name, of a layer's tensors that are not trained as usual."""
        return {}

    def callbacks(self, model: nn.Module) -> Sequence[TrainerCallback]:
        """Return the callbacks that ``rasa-ext sft`` adds to the Trainer.

        It is also called once on a model of empty tensors, before the base's weights are read.

        Args:
            model: patched with this config.

        Returns:
            Callbacks of transformers' Trainer; by default none.

        Raises:
            ValueError: the method cannot be trained; the message names the field at fault.
        """
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Return the config as the JSON values of ``adapter_config.json``.

        Names follow the official code: ``r`` for rank, and the prefix ``rasa_`` for other fields of
        a method. A field at the default is left out, unless the official code writes it.
        """
        settings: dict[str, Any] = {
            "peft_type": self.peft_type,
            "target_modules": _listed(self.target_modules),
            "exclude_modules": _listed(self.exclude_modules) or None,
            "modules_to_save": _listed(self.modules_to_save) or None,
            "rasa_groups": groups_to_json(self.groups),
            "bias": "none",
            "adapter_dtype": str(self.adapter_dtype).removeprefix("torch."),
            "rasa_dropout": self.dropout,
        }
        if not self.template:
            settings["rasa_template"] = False
        if self.tokens:
            settings["trainable_token_indices"] = tokens_to_json(self.tokens)
        if self.method != OFFICIAL:
            settings["rasa_method"] = self.method
        for field in self._own_fields():
            value = getattr(self, field.name)
            if field.name in (*_ALWAYS, *self.absent) or value != field.default:
                mapping = field.metadata.get("counts")
                settings[key_of(field.name)] = dict(value) if mapping else value
        return settings

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a config that ``to_dict`` or the official code wrote.

        Raises:
            ValueError: the file is for another method, asks for a trained bias, or lacks a field.
        """
        kind = data.get("peft_type")
        if kind != cls.peft_type:
            raise ValueError(
                f"adapter_config.json: expected peft_type {cls.peft_type!r}, {other_method(kind)}."
            )
        if (method := data.get("rasa_method", OFFICIAL)) != cls.method:
            raise ValueError(
                f"adapter_config.json: expected rasa_method {cls.method!r}, got {method!r}."
            )
        if data.get("bias", "none") not in BIASES:
            raise ValueError(
                f"adapter_config.json: expected bias {', '.join(BIASES)}, got {data['bias']!r}."
            )
        if data.get("layers_to_transform") is not None:
            raise ValueError(
                "adapter_config.json: layers_to_transform is not supported; name the layers in "
                "target_modules as a regular expression instead."
            )
        keys = {field.name: key_of(field.name) for field in dataclasses.fields(cls)}
        needed = [keys[name] for name in ("rank", "k", "target_modules") if name in keys]
        if missing := [key for key in needed if data.get(key) is None]:
            raise ValueError(f"adapter_config.json: {', '.join(missing)} missing.")
        given = {name: data[key] for name, key in keys.items() if data.get(key) is not None}
        given = {**cls.absent, **given}
        for field in cls._own_fields():
            if field.name in given:
                _check_json(keys[field.name], given[field.name], field)
        return cls(**given)

    @classmethod
    def _own_fields(cls) -> list[dataclasses.Field[Any]]:
        """Return the fields that only this method has."""
        common = {field.name for field in dataclasses.fields(AdapterConfig)}
        return [field for field in dataclasses.fields(cls) if field.name not in common]

    def differences(self, other: AdapterConfig) -> list[str]:
        """Return the fields in which two configs differ, as ``name: mine, theirs``."""
        if type(self) is not type(other):
            return [f"method: {type(self).__name__}, {type(other).__name__}"]
        return [
            f"{field.name}: {getattr(self, field.name)!r}, {getattr(other, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.compare and getattr(self, field.name) != getattr(other, field.name)
        ]


def _check_json(key: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Raise ValueError if a value in a file is too large or has the wrong type for the field."""
    kind: Any = object
    words = ""
    if numbers := field.metadata.get("counts", 0):
        kind, words = Mapping, "an object"
    elif isinstance(field.default, tuple):
        kind, words = list | tuple, "a list"
    elif isinstance(field.default, bool):
        kind, words = bool, "true or false"
    if not isinstance(value, kind):
        raise ValueError(f"adapter_config.json: expected {key} to be {words}, got {value!r}.")
    if isinstance(value, int) and abs(value) >= 1 << 62:
        raise ValueError(f"adapter_config.json: expected {key} to fit in 62 bits, got {value}.")
    counts: Any = value if isinstance(field.default, tuple) else ()
    for entry in counts.values() if isinstance(counts, Mapping) else counts:
        for count in entry if numbers > 1 and isinstance(entry, list | tuple) else [entry]:
            if type(count) is not int or not 0 <= count <= MOST_POOLED:
                raise ValueError(
                    f"adapter_config.json: expected {key} to hold counts of ranks, got {count!r}."
                )


def key_of(field: str) -> str:
    """Return the name of a config's field in ``adapter_config.json`` and in PEFT."""
    shared = {f.name for f in dataclasses.fields(AdapterConfig)} - {"dropout", "groups", "template"}
    same = field in shared or field == "rank_pattern"
    return field if same else {"rank": "r"}.get(field, f"rasa_{field}")


def other_method(kind: Any) -> str:
    """Return a clause that describes another method's adapter, and the library that reads it."""
    if kind == "LORA":
        return (
            "got 'LORA'; convert this LoRA with rasa_ext.import_lora(model, directory) or "
            "`rasa-ext import-lora DIRECTORY --output NEW`"
        )
    if kind is None:
        return "got none; check that this is the folder of an adapter"
    return f"got {kind!r}; load adapters of PEFT's own methods with PEFT"


def document_fields(config: type[AdapterConfig]) -> None:
    """Add every field's help text to the class's docstring, as the section ``Args``.

    Args:
        config: a class with a docstring that has a section ``Raises``.

    Example:
        >>> rasa_ext.methods.LoraConfig.__doc__.count("rank: The rank r of every layer")
        1
    """
    lines = "".join(f"    {f.name}: {f.metadata['help']}\n" for f in dataclasses.fields(config))
    head, mark, tail = inspect.cleandoc(config.__doc__ or "").partition("Raises:\n")
    config.__doc__ = f"{head}Args:\n{lines}\n{mark}{tail}"


def fresh_A(
    rank: int, spec: LayerSpec, dtype: torch.dtype, experts: tuple[int, ...] = ()
) -> Tensor:
    """Draw A (*experts, rank, in) as LoRA does, uniformly in +-1/sqrt(in).

    Without ranks it is no Parameter: engines that shard refuse empty ones.
    """
    shape = (*experts, rank, spec.in_features)
    bound = 1 / math.sqrt(spec.in_features)
    A = torch.empty(shape, dtype=dtype, device=spec.device)
    return nn.Parameter(A.uniform_(-bound, bound)) if rank else A


def fresh_B(
    rank: int, spec: LayerSpec, dtype: torch.dtype, experts: tuple[int, ...] = ()
) -> Tensor:
    """Make B (*experts, out, rank) of zeros; without ranks it is no Parameter."""
    shape = (*experts, spec.out_features, rank)
    zeros = torch.zeros(shape, dtype=dtype, device=spec.device)
    return nn.Parameter(zeros) if rank else zeros


def checked_integer(name: str, value: Any) -> int:
    """Check an argument or a field that must be an integer.

    Args:
        name: of the argument, for the error.
        value: what was given.

    Returns:
        ``value``.

    Raises:
        TypeError: it is not an integer; booleans are refused.

    Example:
        >>> rasa_ext.methods.checked_integer("rank", 8)
        8
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__}).")
    return value


def checked_number(name: str, value: Any) -> float:
    """Check an argument or a field that must be a number.

    Args:
        name: of the argument, for the error.
        value: what was given.

    Returns:
        ``value`` as a float; infinity for an integer that is too large.

    Raises:
        TypeError: it is not a number; booleans are refused.

    Example:
        >>> rasa_ext.methods.checked_number("alpha", 8)
        8.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__}).")
    return math.inf if value > _LARGEST else float(value)


def checked_counts(name: str, value: Any) -> tuple[tuple[Any, int], ...]:
    """Return a mapping to integers >= 0, or pairs, as pairs; raise for other values."""
    try:
        pairs = tuple(dict(value).items())
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a mapping to integers, got {value!r} ({type(value).__name__})."
        ) from None
    if any(checked_integer(name, count) < 0 for _, count in pairs):
        raise ValueError(f"{name}: expected integers >= 0, got {dict(pairs)}.")
    return pairs


def checked_rank(value: Any) -> int:
    """Return ``value``; raise TypeError or ValueError if it is not a rank."""
    rank = checked_integer("rank", value)
    if not 1 <= rank <= MOST_RANKS:
        limit = ">= 1" if rank < 1 else f"<= {MOST_RANKS}"
        raise ValueError(f"rank: expected an integer {limit}, got {rank}.")
    return rank


def checked_alpha(value: Any) -> float:
    """Return ``value``; raise TypeError or ValueError if it is not a finite number above 0."""
    alpha = checked_number("alpha", value)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number above 0, got {alpha}.")
    return alpha


_CHECKS: dict[str, Callable[[Any], Any]] = {"rank": checked_rank, "alpha": checked_alpha}


def checked_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Check an argument or a field that must be one of several values.

    Args:
        name: of the argument, for the error.
        value: what was given.
        choices: the allowed values.

    Returns:
        ``value``.

    Raises:
        ValueError: it is not among the choices.

    Example:
        >>> rasa_ext.methods.checked_choice("side", "A", ("A", "B"))
        'A'
    """
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}.")
    return value


def checked_dtype(name: str, value: Any) -> torch.dtype:
    """Return ``value`` as a dtype; raise if it is not a dtype for parameters."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {value!r} ({type(value).__name__}).")
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}.")
    return dtype


def checked_groups(value: Any) -> Groups:
    """Convert ``groups`` to the form in a config; raise for any other value."""
    if value is None:
        return ()
    if callable(value):
        return value  # type: ignore[no-any-return]  # the result is checked at each call
    kinds = "a sequence of patterns, a mapping of names to patterns, or a callable"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"groups: expected {kinds}, got {value!r} ({type(value).__name__}).")
    items = value.items() if isinstance(value, Mapping) else value
    entries = []
    for item in items:
        pair = (item, (item,)) if isinstance(item, str) else item
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"groups: expected {kinds}, got the item {item!r}.")
        label, patterns = pair
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(label, str) or not label:
            raise TypeError(f"groups: expected {kinds}, got the name {label!r}.")
        entries.append((label, tuple(_names("groups", patterns))))
    return tuple(entries)


def groups_to_json(groups: Any) -> dict[str, list[str]] | None:
    """Return ``groups`` for a file; raise ValueError for a callable, which cannot be saved."""
    if callable(groups):
        raise ValueError(
            "groups: a callable cannot be saved in a file; patch a model with the config, after "
            "which the model's config has the mapping that the callable returned, or pass patterns."
        )
    return {label: list(patterns) for label, patterns in groups} or None


def _names(name: str, value: Any, regex: bool = False) -> str | tuple[str, ...]:
    if isinstance(value, str) and regex:
        check_pattern(name, value)
        return value
    kinds = "a string or a sequence of strings" if regex else "a sequence of strings"
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise TypeError(f"{name}: expected {kinds}, got {value!r} ({type(value).__name__}).")
    names: tuple[str, ...] = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    for item in names:
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}: expected {kinds}, got the item {item!r}.")
    return names


def _listed(value: Names) -> str | list[str]:
    return value if isinstance(value, str) else list(value)
