"""The emulation's float16 and bfloat16 agree with torch's for every number."""

import pytest
import torch


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_widens_and_comes_back(kernels, dtype):
    bits = torch.arange(65536).to(torch.uint16)
    wide = bits.view(getattr(torch, dtype)).float()
    widen, narrow = getattr(kernels, f"from_{dtype}"), getattr(kernels, f"to_{dtype}")
    ours = torch.tensor([widen(b) for b in range(65536)])
    torch.testing.assert_close(ours, wide, rtol=0, atol=0, equal_nan=True)
    numbers = ~wide.isnan()
    back = torch.tensor([narrow(value) for value in ours[numbers].tolist()])
    assert torch.equal(back, bits[numbers].long())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding(kernels, dtype):
    """Rounding agrees halfway between neighbours, just beside that, and for random numbers."""
    bits = torch.arange(0, 0x7C00, 7).to(torch.uint16).view(getattr(torch, dtype)).float()
    above = (torch.arange(0, 0x7C00, 7) + 1).to(torch.uint16).view(getattr(torch, dtype)).float()
    middle = (bits + above) / 2
    values = torch.cat(
        [
            middle,
            torch.nextafter(middle, bits),
            torch.nextafter(middle, above),
            torch.randn(2000) * torch.exp2(torch.randint(-40, 30, (2000,))),
            torch.tensor([65519.0, 65520.0, 1e38, 2.0**-25, 2.0**-24, 3.4e38]),
        ]
    )
    values = torch.cat([values, -values])
    expected = values.to(getattr(torch, dtype)).view(torch.uint16).long()
    ours = torch.tensor([getattr(kernels, f"to_{dtype}")(value) for value in values.tolist()])
    assert torch.equal(ours, expected)
