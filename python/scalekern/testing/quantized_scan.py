"""Sample inputs of the scans over 8-bit inputs.

Shape letters: B batch, L length, H heads, P head dim, D channels, G groups, N states, S state slots.
"""

import torch

from scalekern.testing import Sample, Spec

STEP = 1 / 64  # about that of normal numbers: codes reach to 2


def _steps(f, *shape):
    return f.positive(*shape) * STEP


def _selective(B, D, L, N, G=None, *, options=True, state=False, cu=None, reverse=False):
    def build(f):
        lead, rows = (B,) if G is None else (B, G), B if cu is None else len(cu) - 1
        delta = f.io(B, D, L, scale=0.5) if options else f.positive(B, D, L, low=0.05, high=0.5).to(f.dtype)
        args = (f.codes(B, D, L), delta, -f.positive(D, N), f.codes(*lead, N, L), f.codes(*lead, N, L), _steps(f, D),
                _steps(f, G or 1), _steps(f, G or 1))  # fmt: skip
        if options:
            args += (f.param(D), f.io(B, D, L), f.param(D, scale=0.3), True)
        return args, dict(
            return_last_state=True, initial_state=f.param(rows, D, N) if state else None,
            cu_seqlens=None if cu is None else f.integers(cu), reverse=reverse,
        )  # fmt: skip

    return build


def _ssd(B, L, H, P, N, G=1, *, options=True, state=None, seq_idx=None, cu=None):
    def build(f):
        dt = f.io(B, L, H, scale=0.5) if options else f.positive(B, L, H, low=0.05, high=0.5).to(f.dtype)
        args = (f.codes(B, L, H, P), dt, -f.positive(H), f.codes(B, L, G, N), f.codes(B, L, G, N), _steps(f, H, P),
                _steps(f, G), _steps(f, G))  # fmt: skip
        kwargs = dict(
            initial_states=None if state is None else f.param(state, H, P, N),
            seq_idx=None if seq_idx is None else f.integers(seq_idx),
            cu_seqlens=None if cu is None else f.integers(cu),
            dt_softplus=options, return_final_states=True, return_varlen_states=cu is not None,
        )  # fmt: skip
        if options:
            kwargs |= dict(D=f.param(H, P), z=f.io(B, L, H, P), dt_bias=f.param(H, scale=0.3), dt_limit=(0.1, 0.9))
        return args, kwargs

    return build


def _update(B, P, N, H=None, G=None, *, slots=None, indices=None):
    def build(f):
        heads, groups = () if H is None else (H,), () if G is None else (G,)
        dt = f.positive(B, P, high=0.5).to(f.dtype) if H is None else f.io(B, *heads, P, scale=0.5)
        args = (f.codes(slots or B, *heads, P, N), f.io(B, *heads, P), dt,
                -f.positive(*heads, P, N), f.io(B, *groups, N), f.io(B, *groups, N), _steps(f, *heads, P))  # fmt: skip
        if H is not None:
            args += (f.param(*heads, P), f.io(B, *heads, P), f.param(*heads, P, scale=0.3))
        kwargs = dict(dt_softplus=H is not None)
        if indices is not None:
            kwargs["state_batch_indices"] = torch.tensor(indices, device=f.device)
        return args, kwargs

    return build


# Small: what crosses a tile or a chunk is compared with the plain op, which has been compared with its oracle.
SPECS = {
    "quantized_selective_scan": Spec(
        (
            Sample("mamba", _selective(2, 6, 7, 5, G=3, state=True)),
            Sample("packed", _selective(1, 4, 11, 3, options=False, cu=[0, 1, 1, 7, 11], reverse=True, state=True)),
        ),
        grows_by_rows=True,
    ),
    "quantized_ssd_scan": Spec(
        (
            Sample("mamba2", _ssd(2, 7, 6, 5, 4, G=3, seq_idx=[[0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]], state=2)),
            Sample("packed", _ssd(1, 9, 2, 3, 4, options=False, cu=[0, 1, 1, 6, 9], state=4)),
        ),
        grows_by_rows=True,
        reorders=True,
    ),
    "quantized_state_update": Spec(
        (
            Sample("mamba", _update(2, 7, 5)),
            Sample("heads", _update(3, 17, 9, H=4, G=2, slots=5, indices=[4, -1, 0])),
        ),
        inplace=(0,),
        integers_off=0.03,  # bfloat16's inputs lie on a grid of 2^-9, so that halves of a step are no accident
    ),
}  # fmt: skip
