"""nn.HSMSSD against the paper's equations in plain torch, pixel by pixel, sharing no code with the package."""

import pytest
import torch
from nn_modules import (
    bound, check_against, check_each_matters, check_loads, error, memory, normal, perturbed, sigmoid, tensors,
)  # fmt: skip

from scalekern.nn import HSMSSD

WIDTH, STATES = 4, 3


def paper(p, x):
    """Lee, Choi & Kim 2024, section 3.2. Returns y and the states side by side, (B, M, L + N)."""
    rows, columns = x.shape[2:]
    pixels = [(i, j) for i in range(rows) for j in range(columns)]
    projected = {(i, j): x[:, :, i, j] @ p["BCdt_proj.conv.weight"][..., 0].T for i, j in pixels}
    taps, mixed = p["dw.conv.weight"][:, 0], []
    for i, j in pixels:
        near = [(s, t) for s in range(3) for t in range(3) if (i + s - 1, j + t - 1) in projected]
        mixed.append(sum(taps[:, s, t] * projected[i + s - 1, j + t - 1] for s, t in near))
    b, c, d = torch.stack(mixed, 1).split(STATES, -1)  # [B, L, N]
    weights = (d + p["A"]).exp()
    weights = weights / weights.sum(1, keepdim=True)
    h = sum(x[:, :, i, j, None] * (weights * b)[:, n, None] for n, (i, j) in enumerate(pixels))  # [B, M, N]
    u, z = (p["hz_proj.conv.weight"][..., 0] @ h).chunk(2, 1)
    h = p["out_proj.conv.weight"][..., 0] @ (u * z * sigmoid(z) + p["D"] * u)
    return torch.cat([torch.stack([(h * c[:, n, None]).sum(-1) for n in range(len(pixels))], -1), h], -1)


def joined(module):
    return bound(module, lambda forward, x: torch.cat([t.flatten(2) for t in forward(x)], -1))


def build(**options):
    torch.manual_seed(0)
    return joined(perturbed(HSMSSD(WIDTH, state_dim=STATES, **options)))


@pytest.mark.parametrize("size, expand", [((3, 5), 1.5), ((1, 1), 1), ((2, 1), 2)], ids=str)
def test_output_states_and_gradients_match_the_paper(size, expand):
    module, x = build(ssd_expand=expand), normal(2, WIDTH, *size)
    check_against(paper, module, x)
    if size == (3, 5):
        check_each_matters(paper, module, x, [n for n in tensors(module) if n != "A"])


def test_layouts_and_low_precision():
    module, x = build(), normal(2, WIDTH, 7, 5)
    expected = paper(tensors(module), x)
    assert error(module(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-12
    assert error(module(x.mT.contiguous().mT), expected) < 1e-12
    assert error(module.float()(x.float()), expected) < 1e-5
    assert error(module.bfloat16()(x.bfloat16()), expected) < 3e-2  # five products in a row, each rounding to 8 bits


def test_the_order_of_rows_matters_only_to_the_filter():
    """A softmax over the pixels, no recurrence: mirrored, an image gives the mirrored image and the same states."""
    module = HSMSSD(WIDTH, state_dim=STATES).double()
    with torch.no_grad():
        module.dw.conv.weight.copy_(module.dw.conv.weight + module.dw.conv.weight.flip(2))
    x = normal(1, WIDTH, 6, 5)
    (y, h), (mirrored, same) = module(x), module(x.flip(2))
    assert error(mirrored, y.flip(2)) < 1e-12 and error(same, h) < 1e-12


def test_memory_is_linear_in_the_pixels():
    module, x = HSMSSD(WIDTH, state_dim=STATES), torch.randn(1, WIDTH, 48, 32)
    short, long = (memory(lambda x: module(x)[0], x[..., : 32 // n]) for n in (4, 1))
    assert all(3 * s < b < 4.1 * s for s, b in zip(short, long)), (short, long)


def test_upstreams_checkpoints_load_and_wrong_use():
    shapes = {
        "A": (3,), "D": (1,), "BCdt_proj.conv.weight": (9, 4, 1), "dw.conv.weight": (9, 1, 3, 3),
        "hz_proj.conv.weight": (16, 4, 1), "out_proj.conv.weight": (4, 8, 1),
    }  # fmt: skip
    module = HSMSSD(4, ssd_expand=2, state_dim=3)
    check_loads(module, shapes)
    assert [t.shape for t in module(torch.randn(0, 4, 3, 2))] == [(0, 4, 3, 2), (0, 4, 3)]
    with pytest.raises(ValueError, match=r"nn.HSMSSD: x must have shape \(\*, 4, \*, \*\), got \(1, 3, 5, 5\)"):
        module(torch.randn(1, 3, 5, 5))
