"""float64 answers for the benchmark cases, from scalekern.reference."""

import torch

from scalekern import reference
from scalekern.reference.causal_conv1d import causal_conv1d_bwd
from scalekern.reference.selective_scan import normalize_matrix, selective_scan_bwd, selective_scan_fwd

CHUNK = 1024


def double(kw: dict) -> dict:
    return {k: v.detach().double() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}


def scan(kw: dict) -> tuple:
    """The output of a scan; the loop over time is 64-bit and sequential, so long scans are for scan_in_chunks."""
    return (reference.selective_scan(**double(kw)),)


def scan_bwd(kw: dict, dout: torch.Tensor) -> tuple[tuple, tuple]:
    """(arguments of selective_scan_bwd in the kernel's own dtypes, the output and the gradients in float64)."""
    tensors = {**kw, "B": normalize_matrix(kw["B"], False, kw["u"]), "C": normalize_matrix(kw["C"], False, kw["u"])}
    softplus = tensors.pop("delta_softplus")
    order = [tensors[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    wide = [t.detach().double() for t in order]
    out, _, checkpoints = selective_scan_fwd(*wide, None, None, softplus, False, True)
    grads = selective_scan_bwd(dout.double(), None, *wide, None, None, checkpoints, softplus, False)
    args = (dout, None, *(t.detach() for t in order), None, None, checkpoints.to(kw["A"].dtype), softplus, False)
    shapes = [t.shape for t in (kw[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))]
    return args, (out, *(g.reshape(s) for g, s in zip(grads[:8], shapes)))


def scan_in_chunks(kw: dict, channels: tuple[int, ...]) -> tuple:
    """The output of a few channels of a long scan of one row: chunks side by side, then joined through their states.

    The first pass finds each chunk's last state from a zero one; the decay over a chunk is exp(A sum d), which
    joins them; the second pass runs every chunk from its true initial state.
    """
    channels = list(channels)
    kw = double(kw)
    length, chunks = kw["u"].shape[-1], -(-kw["u"].shape[-1] // CHUNK)
    pad = chunks * CHUNK - length
    # (rows, L) -> (chunks, rows, CHUNK)
    cut = lambda t: torch.nn.functional.pad(t, (0, pad)).view(-1, chunks, CHUNK).transpose(0, 1)
    pick = {k: cut(kw[k][0, channels]) for k in ("u", "delta", "z")} | {k: cut(kw[k][0]) for k in ("B", "C")}
    pick |= {k: kw[k][channels] for k in ("A", "D", "delta_bias")}
    pick["delta_softplus"] = kw["delta_softplus"]
    local = reference.selective_scan(**pick, return_last_state=True)[1]  # (chunks, channels, N)
    step = pick["delta"] + pick["delta_bias"][:, None]
    step = torch.nn.functional.softplus(step) if pick["delta_softplus"] else step
    decay = torch.exp(pick["A"] * step.sum(-1)[..., None])
    initial = torch.zeros_like(local)
    for i in range(1, chunks):
        initial[i] = decay[i - 1] * initial[i - 1] + local[i - 1]
    out = reference.selective_scan(**pick, initial_state=initial)  # (chunks, channels, CHUNK)
    return (out.transpose(0, 1).reshape(1, len(channels), -1)[..., :length],)


def update(state: torch.Tensor, args: dict) -> tuple:
    mine = state.double()
    return reference.selective_state_update(mine, **double(args)), mine


def conv(kw: dict) -> tuple:
    return (reference.causal_conv1d(**double(kw)),)


def conv_bwd(kw: dict, dout: torch.Tensor) -> tuple:
    wide = double(kw)
    return causal_conv1d_bwd(dout.double(), None, wide["x"], wide["weight"], wide["bias"], None, None, None, True)[:3]


def conv_update(x, state, rest) -> tuple:
    mine = state.double()
    weight, bias, activation = rest
    return reference.causal_conv1d_update(x.double(), mine, weight.double(), bias.double(), activation), mine
