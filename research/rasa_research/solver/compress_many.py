"""compress_many: several LoRAs of one base over one shared basis, each with a diagonal."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rasa_ext.checkpoint import Lora, read_lora
from rasa_ext.linalg import svd_of_product
from rasa_research.solver.lora_set import LoraSet, lora_settings
from rasa_research.solver.low_rank import Matrix
from rasa_research.solver.shared_basis import SharedBasis, find_shared_basis, largest

Directories = Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True)
class Distances:
    """Relative errors of approximations of several LoRAs, in the Frobenius norm.

    Squares are divided by the adapter's squared norm, so every adapter has equal weight: the total
    is the root mean square of the adapters' errors. It is 0 if nothing changes.

    Example:
        >>> from rasa_research import solver
        >>> whole = {"q": torch.tensor([4.0, 1.0]), "v": torch.tensor([0.0, 3.0])}
        >>> lost = {"q": torch.tensor([1.0, 0.0]), "v": torch.tensor([0.0, 1.0])}
        >>> errors = solver.Distances(("maths", "code"), whole, lost)
        >>> errors.adapters
        {'maths': 0.5, 'code': 0.5}
        >>> errors.total
        0.5
    """

    names: tuple[str, ...]
    whole: dict[str, Tensor]
    """||M||^2 by layer, one entry per adapter, (n,) float64."""
    lost: dict[str, Tensor]
    """||M - M^||^2 by layer, one entry per adapter, (n,) float64."""

    @property
    def total(self) -> float:
        """Error over all layers and adapters."""
        return self.over(self.whole)

    @property
    def layers(self) -> dict[str, float]:
        """Error of each layer, over the adapters."""
        return {layer: self.over([layer]) for layer in self.whole}

    @property
    def adapters(self) -> dict[str, float]:
        """Error of each adapter, over all layers: ||M - M^|| / ||M||."""
        whole = torch.stack([*self.whole.values()]).sum(0).tolist()
        lost = torch.stack([*self.lost.values()]).sum(0).tolist()
        return dict(zip(self.names, map(_ratio, lost, whole), strict=True))

    def over(self, layers: Iterable[str]) -> float:
        """Return the error over some layers and all adapters."""
        layers, weights = list(layers), _weights(self.whole)
        lost = sum((self.lost[layer] @ weights).item() for layer in layers)
        return _ratio(lost, sum((self.whole[layer] @ weights).item() for layer in layers))


@dataclasses.dataclass(frozen=True)
class CompressedLoras:
    """Several LoRAs over one basis, with their errors and those of separate LoRAs of equal size.

    Example:
        >>> from rasa_research import solver
        >>> import copy
        >>> for name in ("maths", "code"):
        ...     tuned = rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1)
        ...     for parameter in rasa_ext.adapter_parameters(tuned):  # in place of a training
        ...         _ = parameter.data.add_(0.1 * torch.randn_like(parameter))
        ...     _ = rasa_ext.export_lora(tuned, name)
        >>> found = solver.compress_many(["maths", "code"], rank=12)
        >>> list(found.errors.adapters)
        ['maths', 'code']
        >>> 0 < found.errors.total < 1, 0 < found.separate.total < 1
        (True, True)
        >>> found.loras.num_parameters < found.given
        True
    """

    loras: LoraSet
    errors: Distances
    separate: Distances
    """The errors of separate LoRAs with equally many parameters in each layer: the R + n R /
    (in + out) largest singular components among all adapters' changes. A fraction of a component
    counts as that share of the next one."""
    given: int
    """Number of parameters in the original LoRAs."""


@torch.no_grad()
def compress_many(
    directories: Directories,
    rank: int,
    *,
    iterations: int = 100,
    tol: float = 1e-6,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompressedLoras:
    """Compress several LoRAs of one base into one shared basis, with a diagonal for each.

    In every layer, B diag(d_i) A approximates dW_i for all adapters i together (JD-Diag of
    "Compress then Serve", arXiv 2407.00066). This is the formula of RaSA's pool with adapters in
    place of layers, solved by RaSA's coordinate descent in float64. The squared error of each
    adapter is divided by its squared norm, so small and large changes have equal weight. The file
    has R * (in + out + n) parameters per layer.

    The descent also starts from the best separate LoRAs with R ranks in total. So the error is
    never larger than that of the adapters' R largest singular components, except for rounding to
    the files' dtype. If all adapters share a basis of rank R, it is found. Adapters with nothing in
    common gain nothing.

    LoRAs may differ in rank, scale and adapted layers. If an adapter lacks a layer, its diagonal
    there is zero. The result has the widest dtype of the files.

    Args:
        directories: two or more directories written by PEFT's ``save_pretrained`` or
            ``export_lora``. Adapter names are the mapping's keys, or the names of the folders.
        rank: R, the rank of each layer's basis and of the LoRAs that the result expands to.
        iterations: largest number of solver rounds in each layer.
        tol: stop when a round lowers the relative squared error by at most this.
        progress: called with (layer, layers done, layers) after each layer.

    Returns:
        The set, with errors by layer, by adapter and in total, and the errors of separate LoRAs.

    Raises:
        FileNotFoundError, TypeError, ValueError: an argument is wrong, or a directory has no plain
            LoRA, has modules trained in full, or has layers of other shapes; the message has the
            path and says what to do.

    Example:
        >>> from rasa_research import solver
        >>> import copy
        >>> for name in ("maths", "code"):
        ...     tuned = rasa_ext.patch_model(copy.deepcopy(model), rank=8, k=1)
        ...     _ = rasa_ext.export_lora(tuned, name)
        >>> found = solver.compress_many({"m": "maths", "c": "code"}, rank=12, iterations=20)
        >>> found.loras.save("set")
        >>> found.loras.expand("m", "maths-12")
    """
    _check_numbers(rank, iterations, tol)
    loras = _read(directories)
    settings = _settings(loras)
    changes = _changes(loras)
    whole = {
        layer: torch.tensor([Matrix(B, A).squared_norm() for B, A in each], dtype=torch.float64)
        for layer, each in changes.items()
    }
    weights = _weights(whole)
    dtypes = {t.dtype for lora in loras.values() for pair in lora.factors.values() for t in pair}
    dtype = functools.reduce(torch.promote_types, dtypes)
    layers, lost, apart = {}, {}, {}
    for done, (layer, each) in enumerate(changes.items(), 1):
        basis = _basis(each, weights.sqrt(), rank, iterations, tol)
        layers[layer] = SharedBasis(*(tensor.to(dtype) for tensor in basis))
        lost[layer] = _lost(each, layers[layer])
        apart[layer] = _lost_apart(each, weights, rank)
        if progress is not None:
            progress(layer, done, len(changes))
    names = tuple(loras)
    return CompressedLoras(
        LoraSet(names, layers, settings),
        Distances(names, whole, lost),
        Distances(names, whole, apart),
        sum(lora.num_parameters for lora in loras.values()),
    )


def _check_numbers(rank: int, iterations: int, tol: float) -> None:
    for name, value, least in (("rank", rank, 1), ("iterations", iterations, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}.")
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}.")
    if not isinstance(tol, int | float) or not tol >= 0:
        raise ValueError(f"tol: expected a number, 0 or more, got {tol!r}.")


def _named(directories: Directories) -> dict[str, Path]:
    if isinstance(directories, str | os.PathLike) or not isinstance(
        directories, Sequence | Mapping
    ):
        raise TypeError(
            "directories: expected a sequence of directories, or a mapping of names to "
            f"directories, got {type(directories).__name__}."
        )
    if isinstance(directories, Mapping):
        return check_names((name, Path(path)) for name, path in directories.items())
    return check_names((folder_name(path), Path(path)) for path in directories)


def folder_name(directory: str | os.PathLike[str]) -> str:
    """Return the adapter name for a directory: the name of the folder."""
    return Path(directory).resolve().name


def check_names(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return directories by adapter name; raise ValueError for bad or equal names, or only one.

    A name must be a valid folder name, because `rasa-ext expand` writes to a folder of that name.
    """
    found: dict[str, Path] = {}
    for name, path in pairs:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"directories: expected a valid folder name for {path}, got {name!r}.")
        if name in found:
            raise ValueError(
                f"directories: expected a different name for each LoRA, but {found[name]} and "
                f"{path} are both named {name!r}; pass a mapping of names to directories or, to "
                "the command, NAME=DIRECTORY."
            )
        found[name] = path
    if len(found) < 2:
        raise ValueError(f"directories: expected two LoRAs or more, got {len(found)}.")
    return found


def _read(directories: Directories) -> dict[str, Lora]:
    loras: dict[str, Lora] = {}
    shapes: dict[str, tuple[tuple[int, int], Path]] = {}
    for name, path in _named(directories).items():
        loras[name] = read_lora(path)
        beside = {"modules_to_save": loras[name].saved, "trainable_token_indices": loras[name].rows}
        for setting, trained in beside.items():
            if key := next(iter(trained), None):
                raise ValueError(
                    f"{path}: expected only a LoRA, but {setting} has trained {key}, which a "
                    "shared basis cannot store; leave this LoRA out, or train it without "
                    f"{setting}."
                )
        for layer, (B, A) in loras[name].factors.items():
            shape = B.shape[0], A.shape[1]
            first, where = shapes.setdefault(layer, (shape, path))
            if shape != first:
                raise ValueError(
                    f"{path}: expected LoRAs of one base, but {layer!r} is {shape} (out, in) here "
                    f"and {first} in {where}."
                )
    return loras


def _settings(loras: Mapping[str, Lora]) -> dict[str, object]:
    configs = {name: lora.config for name, lora in loras.items()}
    bases = {name: config.get("base_model_name_or_path") for name, config in configs.items()}
    told = {base: name for name, base in bases.items() if base}
    if len(told) > 1:
        listed = "; ".join(f"{name}: {base}" for base, name in told.items())
        warnings.warn(
            f"the LoRAs name their base differently ({listed}); the result is useful only if "
            "they all mean the same model.",
            stacklevel=3,
        )
    return lora_settings(configs, list(dict.fromkeys(k for x in loras.values() for k in x.factors)))


def _changes(loras: Mapping[str, Lora]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return (B, A) of every adapter by layer, in float64 with the scale in B.

    An adapter without the layer has factors of rank 0.
    """
    shapes = {
        layer: (B.shape[0], A.shape[1])
        for lora in loras.values()
        for layer, (B, A) in lora.factors.items()
    }
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer, (out, width) in shapes.items():
        none = torch.zeros(out, 0).double(), torch.zeros(0, width).double()
        changes[layer] = []
        for lora in loras.values():
            B, A = lora.factors.get(layer, none)
            changes[layer].append((lora.scales.get(layer, 0.0) * B.double(), A.double()))
    return changes


def _weights(whole: Mapping[str, Tensor]) -> Tensor:
    """Return 1 / ||M_i||^2 of each adapter over all layers, (n,), or 0 if it changes nothing."""
    totals = torch.stack([*whole.values()]).sum(0)
    return torch.where(totals > 0, totals.reciprocal(), 0.0)


def _basis(
    changes: Sequence[tuple[Tensor, Tensor]],
    scales: Tensor,
    rank: int,
    iterations: int,
    tol: float,
) -> SharedBasis:
    """Return the best basis for the changes, each multiplied by its entry of ``scales``."""
    pairs = zip(changes, scales, strict=True)
    scaled = [(scale * B, A) for (B, A), scale in pairs]
    B, A, d = find_shared_basis(scaled, rank, iterations=iterations, tol=tol)
    back = torch.where(scales > 0, scales.reciprocal(), 0.0)
    return SharedBasis(B, A, d * back[:, None])


def _lost(changes: Sequence[tuple[Tensor, Tensor]], basis: SharedBasis) -> Tensor:
    """Return ||B_i A_i - B diag(d_i) A||^2 of each adapter, computed from the factors."""
    B, A, d = (tensor.double() for tensor in basis)
    lost = [
        Matrix(torch.cat([Bi, -B * d[i]], 1), torch.cat([Ai, A])).squared_norm()
        for i, (Bi, Ai) in enumerate(changes)
    ]
    return torch.tensor(lost, dtype=torch.float64).clamp_min(0.0)


def _lost_apart(changes: Sequence[tuple[Tensor, Tensor]], weights: Tensor, rank: int) -> Tensor:
    """Return the squared errors of separate LoRAs with as many parameters as a rank-R basis."""
    out, width = changes[0][0].shape[0], changes[0][1].shape[1]
    components = rank * (1 + len(changes) / (out + width))
    squares = [svd_of_product(B, A).S.square() for B, A in changes]
    counted = [each * weight for each, weight in zip(squares, weights, strict=True)]
    lost = torch.stack([each.sum() for each in squares])
    order = largest(counted, math.ceil(components))
    for place, (i, j) in enumerate(order):
        lost[i] -= min(components - place, 1.0) * squares[i][j]
    return lost.clamp_min(0.0)


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
