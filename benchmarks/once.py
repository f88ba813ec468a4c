"""Every operator once over a few awkward shapes, against float64 on the CPU.

    python -m benchmarks.once [--device cuda] [--few] [--weight-space]

Short enough to run under compute-sanitizer, as ``benchmarks.gpu_report`` does. On a CUDA device the
exit status is 1 if an operator has no CUDA kernel, since PyTorch would be checked instead.
Operators made of torch's own kernels are compared with themselves in float64, where they are plain
products.
"""

from __future__ import annotations

import argparse
import itertools
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.records import kernels_missing
from rasa_ext import ops

PYTORCH = SimpleNamespace(
    **{
        name: getattr(ops, name) if name in ops.COMPOSED else kernel
        for name, (_, kernel) in ops.OPERATORS.items()
    }
)

# (tokens, in, out, private ranks, pool ranks): odd, unaligned, decoding's few tokens, k = r.
SHAPES = ((3, 40, 24, 7, 32), (1032, 64, 72, 7, 32), (17, 33, 9, 3, 6), (64, 128, 72, 0, 8))
SHAPES += ((1, 257, 130, 8, 0), (1100, 96, 264, 8, 128))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LAYERS = 3


def adapter(shape: tuple[int, ...]) -> tuple:
    """Return A, A_pool, B, B_pool and d of LAYERS layers, in float32 on the CPU."""
    _, width, out, own, pooled = shape
    A, B = torch.randn(LAYERS, own, width), torch.randn(LAYERS, out, own)
    d = torch.randn(LAYERS, own + pooled)
    return list(A), torch.randn(pooled, width), list(B), torch.randn(out, pooled), list(d)


def weight_space(functions, dtype: torch.dtype, tensors: dict) -> dict[str, object]:
    """Run the operators of ``functions`` that launch only kernels of this package."""
    _, _, *rest = tensors["adapter"]
    grads = list(tensors["dAp"]), list(tensors["dBp"])
    return {
        "pack_group": functions.pack_group(*tensors["adapter"], dtype, 16),
        "without d": functions.pack_group(*tensors["adapter"][:-1], [], dtype, 16),
        "pack_group_backward": functions.pack_group_backward(*grads, *rest),
        "of dAp": functions.pack_group_backward(grads[0], [], *rest),
        "of dBp": functions.pack_group_backward([], grads[1], *rest[:-1], []),
    }


def products(functions, tensors: dict, packs) -> dict[str, object]:
    """Run the operators of ``functions`` that contain matrix products."""
    x, weight, grad = (tensors[name] for name in ("x", "weight", "grad"))
    # All operators start from the same packs, so that only their own rounding is compared.
    Ap, Bp = packs
    y, U = functions.low_rank_linear(x, weight, None, Ap, Bp)
    dx, dAp, dBp = functions.low_rank_linear_backward(
        grad, x, weight, tensors.get("U", U), Ap, Bp, True, True, True
    )
    found: dict[str, object] = {"linear": (y, U), "backward": (dx, dAp, dBp)}
    found["add"] = functions.low_rank_add(grad, x, Ap, Bp)[0]
    dropped = tensors["mask"], 1.25
    found["masked"] = functions.low_rank_linear(x, weight, None, Ap, Bp, *dropped)
    found["masked_backward"] = functions.low_rank_linear_backward(
        grad, x, weight, tensors.get("U", U), Ap, Bp, True, True, True, *dropped
    )
    wide_Ap, ups, weights = torch.cat([Ap, Ap]), [Bp, Bp], [weight, weight]
    outputs, wide_U = functions.linear_projections(x, weights, [], wide_Ap, ups)
    found["projections"] = (*outputs, wide_U)
    wide_U = torch.cat([tensors["U"], tensors["U"]], 1) if "U" in tensors else wide_U
    found["projections_backward"] = functions.linear_projections_backward(
        [grad, grad], x, weights, wide_U, wide_Ap, ups, True, True, True
    )
    stacked = tensors["stacked_Ap"], tensors["stacked_Bp"]
    found["delta_group"] = functions.delta_group(*stacked)
    xs, grads, Us = (torch.stack([t] * LAYERS) for t in (x, grad, tensors.get("U", U)))
    weights = [weight] * LAYERS
    found["layers"] = functions.linear_group(xs, weights, None, *stacked)
    found["layers_backward"] = functions.linear_group_backward(
        grads, xs, weights, Us, *stacked, True, True
    )
    ends, by_expert = tensors["ends"], torch.stack([weight.t()] * LAYERS)
    found["experts"] = functions.experts_linear(x, by_expert, ends)
    found["experts_outer"] = functions.experts_outer(x, grad, ends)
    weights = [weight.clone() for _ in range(LAYERS)]
    functions.merge_group(weights, *stacked)
    found["merge_group"] = weights
    return found


def moved(value, device: str, dtype: torch.dtype | None = None):
    """Move tensors, also in lists and tuples, to a device; cast floats to ``dtype`` if given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype and value.is_floating_point() else value.dtype)
    return type(value)(moved(each, device, dtype) for each in value)


def flat(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for each in value for t in flat(each)]


def check(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, with_products: bool = True
) -> int:
    """Return the number of results compared; exit with an error if one is off."""
    tokens, width, out, own, pooled = shape
    made = adapter(shape)
    padded = -(-(own + pooled) // 16) * 16
    low = {
        "x": torch.randn(tokens, width),
        "weight": torch.randn(out, width),
        "grad": torch.randn(tokens, out),
        "U": torch.randn(tokens, padded),
        "stacked_Ap": torch.randn(LAYERS, padded, width),
        "stacked_Bp": torch.randn(LAYERS, padded, out),
    }
    low = {name: tensor.to(dtype) for name, tensor in low.items()}
    high = {
        "adapter": made,
        "dAp": torch.randn(LAYERS, padded, width),
        "dBp": torch.randn(LAYERS, padded, out),
        "ends": torch.tensor([tokens // 3, tokens // 3, tokens], dtype=torch.int32),
        "mask": torch.randint(256, (-(-tokens * width // 8),), dtype=torch.uint8),
    }
    packs = [stacked[0] for stacked in ops.pack_group(*made, dtype, 16)]
    here = {name: moved(value, device) for name, value in (low | high).items()}
    exact = {name: moved(value, "cpu", torch.float64) for name, value in (low | high).items()}
    found = weight_space(ops, dtype, here)
    truth = weight_space(PYTORCH, torch.float64, exact)
    draw_dropout(here["x"])
    if with_products:
        found |= products(ops, here, moved(packs, device))
        truth |= products(PYTORCH, exact, moved(packs, "cpu", torch.float64))
    compared = 0
    for name, expected in truth.items():
        for mine, value in zip(flat(found[name]), flat(expected), strict=True):
            compared += 1
            error = (mine.cpu().double() - value).norm()
            if not error <= LIMIT[dtype] * value.norm().clamp_min(1e-30):
                raise SystemExit(
                    f"{name} of {shape} in {dtype} differs by {error / value.norm():.2e}"
                )
    return compared


def draw_dropout(x: Tensor) -> None:
    """Check that dropout's bits depend only on the noise; each device draws in a different way."""
    words = ops.noise_words(x.device.type, x.numel())
    noise = torch.randint(2**62, (words,)).to(x.device)
    mask, again = ops.dropout(noise, x, 0.5), ops.dropout(noise, torch.zeros_like(x), 0.5)
    if not torch.equal(mask, again):
        raise SystemExit(f"dropout of {tuple(x.shape)} draws different bits from equal noise")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--few", action="store_true", help="only two shapes and two dtypes")
    arguments.add_argument("--weight-space", action="store_true", help="no matrix products")
    given = arguments.parse_args()
    torch.manual_seed(0)
    todo = itertools.product(SHAPES[: 2 if given.few else None], DTYPES[: 2 if given.few else None])
    compared = sum(check(*each, given.device, not given.weight_space) for each in todo)
    print(f"{compared} results agree with float64; {ops.cuda_status()}")
    if why := kernels_missing(given.device):
        raise SystemExit(f"no kernels to check: {why}")


if __name__ == "__main__":
    main()
