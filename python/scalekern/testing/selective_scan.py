"""Sample inputs of the selective_scan family.

Shape letters: B batch, D channels, L length, N state size, G groups, S packed sequences, W filter width.
"""

import torch

from scalekern.testing import Sample, Spec


def _scan(B, D, L, N, G=None, *, constant="", gate=True, skip=True, bias=True, softplus=True, state=False, cu=None,
          reverse=False, complex_A=False, last=True, columns=False):  # fmt: skip
    """A builder of selective_scan arguments. G None: (B, N, L) matrices; constant: which of B and C are (D, N). L may be
    an image's (H, W); `columns`: transposed ones, so that lines are not one stride apart."""
    L = L if isinstance(L, tuple) else (L,)

    def build(f):
        matrix = f.complex if complex_A else f.io
        A = -f.positive(D, N)
        if complex_A:
            A = torch.complex(A, f.param(D, N))
        lead = (B,) if G is None else (B, G)
        matrices = [
            (f.complex(D, N) if complex_A else f.io(D, N)) if name in constant else matrix(*lead, N, *L) for name in "BC"
        ]
        delta = f.io(B, D, *L, scale=0.5) if softplus else f.positive(B, D, *L, low=0.05, high=0.5).to(f.dtype)
        rows = B if cu is None else len(cu) - 1
        args = (f.io(B, D, *L), delta, A, *matrices, f.param(D) if skip else None, f.io(B, D, *L) if gate else None,
                f.param(D, scale=0.3) if bias else None, softplus, last)  # fmt: skip
        if columns:
            args = tuple(x.transpose(-2, -1) if isinstance(x, torch.Tensor) and x.dim() > 3 else x for x in args)
        initial = (f.complex if complex_A else f.param)(rows, D, N) if state else None
        kwargs = dict(initial_state=initial, cu_seqlens=None if cu is None else f.integers(cu), reverse=reverse)
        return args, kwargs

    return build


def _update(B, P, N, H=None, G=None, *, slots=None, indices=None, extras=True, softplus=True, tied=False):
    def build(f):
        heads = () if H is None else (H,)
        groups = () if G is None else (G,)
        dt = f.io(B, *heads, 1, scale=0.5).expand(B, *heads, P) if tied else f.io(B, *heads, P, scale=0.5)
        args = (f.param(slots or B, *heads, P, N), f.io(B, *heads, P), dt, -f.positive(*heads, P, N),
                f.io(B, *groups, N), f.io(B, *groups, N))  # fmt: skip
        if extras:
            args += (f.param(*heads, P), f.io(B, *heads, P), f.param(*heads, P, scale=0.3))
        kwargs = dict(dt_softplus=softplus)
        if indices is not None:
            kwargs["state_batch_indices"] = f.integers(indices)
        return args, kwargs

    return build


def _conv(B, D, L, W, *, bias=True, silu=True, state=False, seq_idx=None, cu=None):
    def build(f):
        rows = B if cu is None else len(cu) - 1
        args = (f.io(B, D, L), f.param(D, W), f.param(D) if bias else None)
        kwargs = dict(
            seq_idx=None if seq_idx is None else f.integers(seq_idx),
            initial_states=f.io(rows, D, W - 1) if state else None,
            return_final_states=True,
            activation="silu" if silu else None,
            cu_seqlens=None if cu is None else f.integers(cu),
        )
        return args, kwargs

    return build


def _conv_update(B, D, W, K, *, T=None, silu=True, bias=True, seen=None, slots=None, indices=None):
    def build(f):
        args = (f.io(B, D) if T is None else f.io(B, D, T), f.io(slots or B, D, K), f.param(D, W))
        kwargs = dict(bias=f.param(D) if bias else None, activation="silu" if silu else None)
        if seen is not None:
            kwargs["cache_seqlens"] = f.integers(seen)
        if indices is not None:
            kwargs["conv_state_indices"] = f.integers(indices)
        return args, kwargs

    return build


def _inner(B, D, L, N, R, M, *, W=4, conv_bias=True, out_bias=False, rms=False, complex_A=False, given=False, level=1):
    """R rank of the step size, M model width; rms: FalconMamba's normalized B, C and step size."""

    def build(f):
        width = 2 * N if complex_A else N
        A = -f.positive(D, N)
        A = torch.complex(A, f.param(D, N)) if complex_A else A
        matrices = (f.io(B, N, L), f.io(D, N)) if given else (None, None)
        rows = R + (0 if given else 2 * width)
        args = (
            f.io(B, 2 * D, L), f.param(D, 1, W, scale=0.5), f.param(D) if conv_bias else None,
            f.io(rows, D, scale=D**-0.5), f.io(D, R, scale=R**-0.5), f.io(M, D, scale=D**-0.5),
            f.io(M) if out_bias else None, A, *matrices, f.param(D), f.param(D, scale=0.3),
        )  # fmt: skip
        weights = dict(b_rms_weight=f.param(N), c_rms_weight=f.param(N), dt_rms_weight=f.param(D)) if rms else {}
        return args, dict(checkpoint_lvl=level, **weights)

    return build


def _mamba_update(B, M, D, N, R, W, K, *, biases=False, skip=True, rms=None, norm=False):
    """K tokens of the convolution's window, R rank of the step size, M model width."""

    def build(f):
        args = (
            f.io(B, M), f.io(B, D, K), f.param(B, D, N), f.io(2 * D, M, scale=M**-0.5), f.param(D, 1, W, scale=0.5),
            f.param(D) if biases else None, f.io(R + 2 * N, D, scale=D**-0.5), f.io(D, R, scale=R**-0.5),
            f.io(M, D, scale=D**-0.5), f.param(D, N, scale=0.5), f.param(D) if skip else None,
            f.param(D, scale=0.3) if skip else None,
        )  # fmt: skip
        given = dict(in_proj_bias=f.io(2 * D), out_proj_bias=f.io(M)) if biases else {}
        return args, dict(rms_eps=rms, norm_weight=f.io(M) if norm else None, norm_eps=1e-3, **given)

    return build


SPECS = {
    "selective_scan": Spec(
        (
            Sample("plain", _scan(2, 5, 7, 4, gate=False, skip=False, bias=False, softplus=False, last=False)),
            Sample("mamba", _scan(2, 18, 67, 16)),
            Sample("grouped", _scan(2, 6, 13, 3, G=3, state=True)),
            Sample("one_token", _scan(1, 1, 1, 1, state=True)),
            Sample("constant_B", _scan(2, 5, 9, 4, constant="B")),
            Sample("constant_C", _scan(2, 6, 9, 4, G=2, constant="C", state=True)),
            Sample("constant_BC", _scan(2, 5, 9, 4, constant="BC", softplus=False)),
            Sample("reverse", _scan(1, 17, 130, 5, reverse=True, state=True)),
            Sample("packed", _scan(1, 7, 150, 4, cu=[0, 1, 64, 64, 131, 150], state=True)),
            Sample("packed_reverse", _scan(1, 4, 81, 16, cu=[0, 70, 81], reverse=True)),
            Sample("large_state", _scan(1, 3, 66, 37, state=True)),
            Sample("image", _scan(2, 5, (7, 11), 4, state=True)),
            Sample("columns", _scan(2, 18, (11, 7), 16, G=2, columns=True)),
            Sample("complex", _scan(2, 5, 70, 4, complex_A=True, state=True)),
            Sample("complex_constant", _scan(1, 4, 9, 3, complex_A=True, constant="B", reverse=True)),
        )
    ),
    "selective_state_update": Spec(
        (
            Sample("mamba", _update(3, 17, 16)),
            Sample("bare", _update(2, 5, 3, extras=False, softplus=False)),
            Sample("heads", _update(2, 5, 19, H=4, G=2, tied=True)),
            Sample("indices", _update(3, 6, 8, slots=5, indices=[4, -1, 0])),
        ),
        inplace=(0,),
    ),
    "causal_conv1d": Spec(
        (
            Sample("mamba", _conv(2, 18, 67, 4)),
            Sample("plain", _conv(2, 5, 9, 2, bias=False, silu=False)),
            Sample("wide", _conv(1, 3, 11, 8, state=True)),
            Sample("short", _conv(2, 3, 1, 5, state=True)),
            Sample(
                "seq_idx", _conv(2, 4, 8, 3, state=True, seq_idx=[[0, 0, 1, 1, 1, 2, -1, -1], [5, 5, 5, 5, 5, 5, 5, 7]])
            ),
            Sample("packed", _conv(1, 5, 20, 4, state=True, cu=[0, 1, 9, 9, 20])),
        )
    ),
    "causal_conv1d_update": Spec(
        (
            Sample("mamba", _conv_update(3, 17, 4, 3)),
            Sample("tokens", _conv_update(2, 5, 3, 6, T=4, silu=False, bias=False)),
            Sample("circular", _conv_update(3, 6, 4, 5, T=2, seen=[0, 4, 13])),
            Sample("indices", _conv_update(3, 6, 4, 3, slots=5, indices=[4, -1, 0])),
        ),
        inplace=(1,),
    ),
    "mamba_inner": Spec(
        (
            Sample("mamba", _inner(2, 6, 13, 4, 2, 5)),
            Sample("rms", _inner(1, 5, 70, 3, 2, 4, rms=True, out_bias=True, conv_bias=False, level=0)),
            Sample("given", _inner(2, 4, 9, 3, 1, 3, given=True, W=2)),
            Sample("complex", _inner(1, 3, 11, 2, 2, 3, complex_A=True)),
        ),
        gradient_factor=6,  # three products, a convolution and a scan, each rounded to the io dtype
    ),
    "mamba_update": Spec(
        (
            Sample("mamba", _mamba_update(2, 35, 37, 16, 3, 4, 4, biases=True)),
            Sample("rms", _mamba_update(1, 8, 19, 5, 2, 3, 2, rms=1e-6, norm=True)),
            Sample("five_rows", _mamba_update(5, 16, 9, 3, 1, 2, 3, skip=False, norm=True)),
            Sample("large_batch", _mamba_update(11, 12, 21, 3, 2, 4, 3)),
        ),
        inplace=(1, 2),
    ),
}  # fmt: skip
