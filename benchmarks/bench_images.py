"""Cases of scans of images: lines in four directions against torch's flips and transposes, GroupMamba's layer.

Shape letters: B batch, D channels, S x S image.
"""

import copy
import functools

import torch
import torch.nn.functional as F

import scalekern
from scalekern import nn, reference
from scalekern.benchmarks import harness, peers
from scalekern.benchmarks.bench_selective_scan import FP32, case, normal
from scalekern.benchmarks.case import Work
from scalekern.testing import TOLERANCE

LOOP, LEAN = "plain torch", "plain torch, decays outside the loop"


def test_case(case, benchmark):
    harness.run_in_pytest(case, benchmark)


# ---- cross_scan --------------------------------------------------------------------------------------------------


def plain_scan(x):
    """VMamba's own: two of the four stacked, then both flipped."""
    lines = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([lines, lines.flip(-1)], 1)


def plain_merge(y, size):
    lines = y[:, :2] + y[:, 2:].flip(-1)
    return lines[:, 0].unflatten(2, size) + lines[:, 1].unflatten(2, size).transpose(2, 3)


def lines(device, dtype=FP32, *, merge, B, D, S) -> Work:
    given = normal(device, 0)(*((B, 4, D, S * S) if merge else (B, D, S, S))).to(dtype)
    more = ((S, S),) if merge else ()
    ours, oracle, plain = (
        (scalekern.cross_merge, reference.cross_merge, plain_merge) if merge
        else (scalekern.cross_scan, reference.cross_scan, plain_scan)
    )  # fmt: skip
    return Work(
        run=lambda: ours(given, *more), oracle=lambda: (oracle(given.double(), *more),), tolerance=TOLERANCE[dtype],
        bytes_moved=5 * B * D * S * S * dtype.itemsize, flops=4 * B * D * S * S,
        peers={"flip, transpose, stack": lambda: peers.torch_peer(lambda: plain(given, *more))},
    )  # fmt: skip


# ---- GroupMamba --------------------------------------------------------------------------------------------------


def recurrence(u, dt, A, B, C):
    """Mamba's equations, token after token. u, dt (B, L, D), A (D, N), B, C (B, L, N)."""
    h, out = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def lean_recurrence(u, dt, A, B, C):
    """The same with all that needs no state made before: D N numbers a token."""
    decay, added = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]
    h, out = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + added[:, t]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def plain_ss2d(m, u, direction, scan):
    x, z = m.in_proj(u).chunk(2, -1)
    x = F.silu(m.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    line = (x.transpose(1, 2) if direction % 2 else x).flatten(1, 2)
    line = line.flip(1) if direction >= 2 else line
    dt, B, C = (line @ m.x_proj_weight[0].T).split([m.dt_projs_weight.shape[2], m.d_state, m.d_state], -1)
    dt = F.softplus(dt @ m.dt_projs_weight[0].T + m.dt_projs_bias[0])
    y = scan(line, dt, -m.A_logs.exp(), B, C) + m.Ds * line
    y = y.flip(1) if direction >= 2 else y
    y = y.unflatten(1, x.shape[2:0:-1]).transpose(1, 2) if direction % 2 else y.unflatten(1, x.shape[1:3])
    return m.out_proj(m.out_norm(y) * F.silu(z))


def plain_group_mamba(m, u, scan=recurrence):
    x = m.norm(u.permute(0, 2, 3, 1))
    affinity = torch.sigmoid(m.fc2(F.relu(m.fc1(x.mean((1, 2))))))[:, None, None]
    blocks = (m.mamba_g1, m.mamba_g2, m.mamba_g3, m.mamba_g4)
    y = torch.cat([plain_ss2d(b, part, k, scan) for k, (b, part) in enumerate(zip(blocks, x.chunk(4, -1)))], -1)
    return m.proj(m.norm(y * m.skip_scale * x * affinity)).permute(0, 3, 1, 2)


def group_mamba(device, dtype=FP32, *, B, D, S) -> Work:
    torch.manual_seed(0)
    D = (D + 3) // 4 * 4
    module = nn.GroupMamba(D, device=device).to(dtype).requires_grad_(False)
    wide, x = copy.deepcopy(module).double(), normal(device, 0)(B, D, S, S).to(dtype)
    plain = lambda scan: lambda: peers.torch_peer(lambda: plain_group_mamba(module, x, scan))
    return Work(
        run=lambda: module(x), oracle=lambda: (plain_group_mamba(wide, x.double(), lean_recurrence),),
        tolerance=4 * TOLERANCE[dtype],  # a layer is several ops in a row
        bytes_moved=2 * B * D * S * S * dtype.itemsize, flops=B * S * S * D * (2 * D + D + 60),
        peers={LOOP: plain(recurrence), LEAN: plain(lean_recurrence)},
    )  # fmt: skip


# ---- the list ----------------------------------------------------------------------------------------------------

_IMAGE, _LARGE = {"B": 8, "D": 96, "S": 56}, {"B": 1, "D": 96, "S": 224}
_SCAN, _MERGE = (functools.partial(lines, merge=merge) for merge in (False, True))
_FAST = ("cuda", "triton", "cpu")
CASES = [
    *(
        case(name, build, (f"{name}_fwd",), "fwd", device, priority, shape, backends=_FAST)
        for device, shape, priority in (("cpu", _IMAGE, 94), ("cpu", _LARGE, 95), ("cuda", {**_IMAGE, "B": 128}, 99))
        for name, build in (("cross_scan", _SCAN), ("cross_merge", _MERGE))
    ),
    case("group_mamba", group_mamba, ("selective_scan_fwd",), "fwd", "cpu", 96, _IMAGE, backends=_FAST,
         targets={LOOP: 10}),
]  # fmt: skip
