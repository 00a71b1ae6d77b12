"""Sample inputs of the Mamba-2 scan and of plain recurrences.

Shape letters: B batch, L length, H heads, P head dim, G groups, N states.
"""

from scalekern.testing import Sample, Spec


def _ssd(B, L, H, P, N, G=1, *, D=None, gate=False, bias=False, softplus=True, state=None, seq_idx=None, cu=None,
         limit=None, final=False, varlen=False):  # fmt: skip
    """D: None, 1 for (H,), 2 for (H, P). state: the number of initial states."""

    def build(f):
        dt = f.io(B, L, H, scale=0.5) if softplus else f.positive(B, L, H, low=0.05, high=0.5).to(f.dtype)
        args = (f.io(B, L, H, P), dt, -f.positive(H), f.io(B, L, G, N), f.io(B, L, G, N))
        kwargs = dict(
            chunk_size=16,
            D=None if D is None else f.param(*(H, P)[:D]),
            z=f.io(B, L, H, P) if gate else None,
            dt_bias=f.param(H, scale=0.3) if bias else None,
            initial_states=None if state is None else f.param(state, H, P, N),
            seq_idx=None if seq_idx is None else f.integers(seq_idx),
            cu_seqlens=None if cu is None else f.integers(cu),
            dt_softplus=softplus, return_final_states=final, return_varlen_states=varlen,
        )  # fmt: skip
        return args, {**kwargs, **({} if limit is None else {"dt_limit": limit})}

    return build


def _runs(*lengths):
    return [i for i, n in enumerate(lengths) for _ in range(n)]


SPECS = {
    "ssd_scan": Spec(
        (
            Sample("plain", _ssd(2, 9, 3, 4, 5, softplus=False)),
            Sample("mamba2", _ssd(2, 67, 4, 6, 8, G=2, D=1, gate=True, bias=True, state=2, final=True)),
            Sample("many_chunks", _ssd(1, 131, 2, 3, 5, D=2, state=1, final=True)),
            Sample("one_token", _ssd(1, 1, 1, 1, 1, state=1, final=True)),
            Sample("limits", _ssd(1, 9, 4, 2, 3, G=4, bias=True, limit=(0.3, 0.9), D=1)),
            Sample("seq_idx", _ssd(2, 80, 2, 3, 4, seq_idx=[_runs(5, 64, 11), _runs(70, 10)], state=2, final=True)),
            Sample(
                "packed", _ssd(1, 90, 2, 3, 4, G=2, cu=[0, 1, 1, 66, 90], state=4, final=True, varlen=True, gate=True)
            ),
            Sample("packed_one_state", _ssd(1, 20, 2, 3, 4, cu=[0, 8, 20], state=1, varlen=True, D=1)),
        ),
        grows_by_rows=True,
        reorders=True,
        operand_error=4e-3,  # a state and the weights of a chunk are rounded to the inputs' type
    ),
}
