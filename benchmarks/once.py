"""Every operator once over a few awkward shapes, against float64 on the CPU.

    python -m benchmarks.once [--device cuda]

Short enough to run under compute-sanitizer, which ``benchmarks.gpu_report`` does.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from rasa_ext import ops
from rasa_ext.ops import reference

# (tokens, in, out, private ranks, pool ranks): odd, unaligned, decoding's few tokens, k = r.
SHAPES = ((3, 40, 24, 7, 32), (17, 33, 9, 3, 6), (64, 128, 72, 0, 8), (1, 257, 130, 8, 0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LAYERS = 3


def adapter(shape: tuple[int, ...]) -> tuple:
    """A, A_pool, B, B_pool, d of LAYERS layers, in float32 on the CPU."""
    _, width, out, own, pooled = shape
    A, B = torch.randn(LAYERS, own, width), torch.randn(LAYERS, out, own)
    d = torch.randn(LAYERS, own + pooled)
    return list(A), torch.randn(pooled, width), list(B), torch.randn(out, pooled), list(d)


def chain(functions, shape, dtype: torch.dtype, tensors: dict, packs=None) -> dict[str, object]:
    """Every operator of ``functions``; token tensors and packs in ``dtype``."""
    A, A_pool, B, B_pool, d = tensors["adapter"]
    x, weight, grad = (tensors[name] for name in ("x", "weight", "grad"))
    single = (A[0], A_pool, B[0], B_pool, d[0])
    found: dict[str, object] = {"pack": functions.pack(*single, dtype, 16)}
    # The products start from the same packs, so that only their own rounding is compared.
    Ap, Bt = packs or found["pack"]
    y, U = functions.low_rank_linear(x, weight, None, Ap, Bt)
    dx, dAp, dBt, _ = functions.low_rank_linear_backward(
        grad, x, weight, tensors.get("U", U), Ap, Bt, None, True, True
    )
    found |= {"linear": (y, U), "backward": (dx, dAp, dBt)}
    found["add"] = functions.low_rank_add(grad, x, Ap, Bt)[0]
    wide = tensors["dAp"], tensors["dBt"]
    found["pack_backward"] = functions.pack_backward(
        wide[0][0].clone(), wide[1][0].clone(), B[0], B_pool, d[0]
    )
    found["pack_layers"] = functions.pack_layers(*tensors["adapter"], dtype, 16)
    found["pack_layers_backward"] = functions.pack_layers_backward(*wide, B, B_pool, d)
    stacked = tensors["stacked_Ap"], tensors["stacked_Bt"]
    found["delta_layers"] = functions.delta_layers(*stacked)
    weights = [weight.clone() for _ in range(LAYERS)]
    functions.merge_layers(weights, *stacked, 0.5)
    found["merge_layers"] = weights
    return found


def moved(value, device: str, dtype: torch.dtype | None = None):
    """Tensors, alone or in lists and tuples, on a device and, where given, in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype or value.dtype)
    return type(value)(moved(each, device, dtype) for each in value)


def flat(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for each in value for t in flat(each)]


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> int:
    """The number of results compared; raises where one is off."""
    tokens, width, out, own, pooled = shape
    made = adapter(shape)
    padded = -(-(own + pooled) // 16) * 16
    low = {
        "x": torch.randn(tokens, width),
        "weight": torch.randn(out, width),
        "grad": torch.randn(tokens, out),
        "U": torch.randn(tokens, padded),
        "stacked_Ap": torch.randn(LAYERS, padded, width),
        "stacked_Bt": torch.randn(LAYERS, out, padded),
    }
    low = {name: tensor.to(dtype) for name, tensor in low.items()}
    high = {
        "adapter": made,
        "dAp": torch.randn(LAYERS, padded, width),
        "dBt": torch.randn(LAYERS, padded, out).transpose(1, 2),
    }
    packs = reference.pack(made[0][0], made[1], made[2][0], made[3], made[4][0], dtype, 16)
    here = {name: moved(value, device) for name, value in (low | high).items()}
    exact = {name: moved(value, "cpu", torch.float64) for name, value in (low | high).items()}
    found = chain(ops, shape, dtype, here, moved(packs, device))
    truth = chain(reference, shape, torch.float64, exact, moved(packs, "cpu", torch.float64))
    compared = 0
    for name, expected in truth.items():
        for mine, value in zip(flat(found[name]), flat(expected), strict=True):
            compared += 1
            error = (mine.cpu().double() - value).norm()
            if not error <= LIMIT[dtype] * value.norm().clamp_min(1e-30):
                raise SystemExit(
                    f"{name} of {shape} in {dtype} is off by {error / value.norm():.2e}"
                )
    return compared


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--few", action="store_true", help="two shapes, two dtypes")
    given = arguments.parse_args()
    torch.manual_seed(0)
    todo = itertools.product(SHAPES[: 2 if given.few else None], DTYPES[: 2 if given.few else None])
    compared = sum(check(shape, dtype, given.device) for shape, dtype in todo)
    print(f"{compared} results agree with float64; {ops.cuda_status()}")


if __name__ == "__main__":
    main()
