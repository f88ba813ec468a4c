"""RaSA's configuration in PEFT's form, under the field names of the official code."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.utils import PeftType

import rasa_ext
from rasa_ext.config import ALL_LINEAR

# A field here, and its name in rasa_ext.RasaConfig.
_CORE_NAMES = {"r": "rank", "rasa_k": "k", "rasa_alpha": "alpha", "rasa_dropout": "dropout"}


@dataclass
class RasaConfig(PeftConfig):
    """The choices of one RaSA adapter under PEFT. Each field's ``metadata["help"]`` explains it.

    Raises TypeError or ValueError, naming the field, what was expected and what came.
    """

    r: int = field(
        default=8,
        metadata={"help": "Ranks that every layer pays for. Trainable numbers grow with it."},
    )
    rasa_k: int | None = field(
        default=None,
        metadata={
            "help": "How many of the r ranks every layer gives to its group's pool; 0 is plain "
            "LoRA, None max(r // 8, 1). The effective rank is r - k + L*k for L layers."
        },
    )
    rasa_alpha: float = field(
        default=8.0,
        metadata={
            "help": "Sets the initial diagonal: alpha/2/(r-k) on the private and alpha/2/(L*k) on "
            "the pooled ranks. The diagonal is trained, so it acts at the start only."
        },
    )
    rasa_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the adapter's input in training, in [0, 1)."}
    )
    target_modules: list[str] | str | None = field(
        default=ALL_LINEAR,
        metadata={
            "help": "Name suffixes, a regular expression for whole names, or 'all-linear' (every "
            "linear layer but output heads, as rasa_ext.patch_model takes them); None is the same."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Layers to leave out: name suffixes, or a regular expression."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt; the others stay out of the pool, too."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names before a layer's index, with layers_to_transform only."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained in full and saved with the adapter."},
    )
    bias: str = field(
        default="none",
        metadata={"help": "Only 'none': the files of an adapter have no place for biases."},
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={
            "help": "Whether weights are (in, out), as those of Conv1D. Seen from the layers; what "
            "is given is replaced by what was found."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Whether B starts at zero, so that the model computes what its base does. "
            "False draws it: for tests."
        },
    )
    adapter_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the trainable parameters; see rasa_ext.RasaConfig."},
    )
    rasa_ext_version: str | None = field(
        default=None, metadata={"help": "The version that wrote the file; leave empty."}
    )

    def __post_init__(self) -> None:
        """Check every field and bring it into PEFT's form."""
        super().__post_init__()
        self.peft_type = PeftType.RASA
        self.rasa_ext_version = self.rasa_ext_version or rasa_ext.__version__
        if isinstance(self.adapter_dtype, torch.dtype):
            self.adapter_dtype = str(self.adapter_dtype).removeprefix("torch.")
        if self.target_modules is None:
            self.target_modules = ALL_LINEAR
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
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
        self.rasa_k = self.core().k

    def core(self) -> rasa_ext.RasaConfig:
        """The same choices as ``rasa_ext.patch_model`` takes them."""
        try:
            return rasa_ext.RasaConfig(
                target_modules=self.target_modules,  # type: ignore[arg-type]
                exclude_modules=self.exclude_modules or (),  # type: ignore[arg-type]
                modules_to_save=self.modules_to_save or (),  # type: ignore[arg-type]
                adapter_dtype=self.adapter_dtype,  # type: ignore[arg-type]
                **{core: getattr(self, name) for name, core in _CORE_NAMES.items()},
            )
        except (TypeError, ValueError) as error:
            core_name, _, text = str(error).partition(":")
            ours = {core: name for name, core in _CORE_NAMES.items()}
            raise type(error)(f"{ours.get(core_name, core_name)}:{text}") from None
