"""Full checkpoints, read one tensor at a time, by a model's parameter names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)  # a file name in the folder of the index
_CHUNK = 1 << 24


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors in a model directory's safetensors files, each read on access.

    A read-only mapping from the names in the files to tensors on the CPU, in the files' dtypes.

    Args:
        directory: directory with ``model.safetensors``, or shards and an index.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; the message has the path.

    Example:
        >>> from rasa_research import solver
        >>> model.save_pretrained("base")
        >>> weights = solver.SafetensorsFolder("base")
        >>> weights["model.embed_tokens.weight"].shape
        torch.Size([320, 32])
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read the tensors' names from the index of shards, or else ``model.safetensors``."""
        directory = Path(directory)
        if (directory / _INDEX).is_file():
            self._files = {key: directory / file for key, file in _shards(directory / _INDEX)}
        elif (directory / _SINGLE).is_file():
            with _opened(directory / _SINGLE) as file:
                self._files = dict.fromkeys(file.keys(), directory / _SINGLE)
        else:
            raise FileNotFoundError(
                f"directory: expected {_SINGLE} or {_INDEX} in {directory}, found neither."
            )

    def __getitem__(self, key: str) -> Tensor:
        """Return the tensor, on the CPU."""
        path = self._files[key]
        with _opened(path) as file:
            try:
                tensor: Tensor = file.get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"{path}: expected a tensor {key}, but {error}.") from None
            return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._files)


class ParameterWeights(Mapping[str, Tensor]):
    """Tensors of ``stored`` by a model's parameter names; tied parameters by the first name.

    A checkpoint may lack the model's prefix (``transformer.``) or have it in excess, and may store
    tied parameters under either name. Tensors without a parameter are left out.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Tensor], where: str) -> None:
        """Find every parameter's key; raise ValueError, starting with ``where``, if one is missing.

        Raises ValueError also if the stored weights of tied parameters differ.
        """
        self._stored, self._where = stored, where
        self._prefix = getattr(model, "base_model_prefix", "")
        self._keys: dict[str, str] = {}
        self._first: dict[str, str] = {}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        missing = []
        for aliases in names.values():
            self._first.update(dict.fromkeys(aliases, aliases[0]))
            keys = [key for key in map(self._find, aliases) if key is not None]
            if keys:
                self._keys[aliases[0]] = keys[0]
                self._check_tied(keys)
            else:
                missing.append(aliases[0])
        if missing:
            raise ValueError(
                f"{where}: expected the weights of this model, but {len(missing)} are missing: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}."
            )

    def __getitem__(self, name: str) -> Tensor:
        """Return the parameter's stored value."""
        return self._stored[self._keys[self.first(name)]]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the parameters' names."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._keys)

    def first(self, name: str) -> str:
        """Return the first of a parameter's names."""
        return self._first.get(name, name)

    def value(self, name: str) -> Tensor:
        """Return the stored value of a parameter or buffer; raise ValueError if there is none."""
        if self.first(name) in self._keys:
            return self[name]
        key = self._find(name)
        if key is None:
            raise ValueError(f"{self._where}: expected a value for {name}, but it is missing.")
        return self._stored[key]

    def _find(self, name: str) -> str | None:
        spelled = [name]
        if self._prefix:
            spelled += [name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"]
        return next((key for key in spelled if key in self._stored), None)

    def _check_tied(self, keys: list[str]) -> None:
        for other in dict.fromkeys(keys[1:]):
            if other != keys[0] and not _same(self._stored[keys[0]], self._stored[other]):
                raise ValueError(
                    f"{self._where}: expected equal weights for {keys[0]} and {other}, which are "
                    "one parameter in the model, but they differ; check that both models' "
                    "config.json have equal tie_word_embeddings."
                )


class Changes(Mapping[str, Tensor]):
    """``finetuned - base`` of linear layers by name, (out, in), computed on access."""

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        base: Mapping[str, Tensor],
        finetuned: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Store the layers by name, both checkpoints by parameter name, and the result's dtype."""
        self._linears, self._base, self._finetuned, self._dtype = linears, base, finetuned, dtype

    def __getitem__(self, name: str) -> Tensor:
        """Return the layer's weight change."""
        before, after = pair(f"{name}.weight", self._base, self._finetuned)
        change = after.to(self._dtype) - before.to(self._dtype)
        # The only other adapted layer, Conv1D, stores its weight as (in, out).
        return change if isinstance(self._linears[name], nn.Linear) else change.t()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the layers' names."""
        return iter(self._linears)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._linears)


def pair(
    name: str, base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return one parameter of both checkpoints.

    Raises ValueError if the shapes differ, and TypeError if a dtype is not floating-point.
    """
    before, after = base[name], finetuned[name]
    if before.shape != after.shape:
        raise ValueError(
            f"finetuned: expected {name} of the base's shape {tuple(before.shape)}, got "
            f"{tuple(after.shape)}; if tokens were added, add as many to the base (with "
            "resize_token_embeddings) and save it."
        )
    for which, tensor in (("base", before), ("finetuned", after)):
        if not tensor.is_floating_point():
            raise TypeError(
                f"{which}: expected floating-point weights, but {name} is {tensor.dtype}; "
                "dequantize it first."
            )
    return before, after


def squared_change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return ||after - before||^2 and ||before||^2, in float64 by chunks."""
    change = total = 0.0
    pieces = zip(before.flatten().split(_CHUNK), after.flatten().split(_CHUNK), strict=True)
    for old, new in pieces:
        old = old.double()
        change += (new.double() - old).square().sum().item()
        total += old.square().sum().item()
    return change, total


def _same(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() or torch.equal(left, right)


def _shards(index: Path) -> Iterable[tuple[str, str]]:
    """Return (tensor name, name of the file beside ``index``) for every tensor."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        if all(_NAME.fullmatch(file) for _, file in shards):
            return list(shards)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{index}: expected a weight_map of tensor names to names of files in its folder; the "
        "index is damaged, or made to read other files; use a complete copy of it."
    )


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise FileNotFoundError(f"directory: expected the weights in {path}, but it is missing.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or cut, since it does not parse as safetensors ({error}); use a "
            "complete copy of it."
        ) from None
