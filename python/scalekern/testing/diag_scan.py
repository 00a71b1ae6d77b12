"""Sample inputs of the diagonal recurrence. Shape letters: B batch, D channels, L length, H heads, S sequences."""

import torch

from scalekern.testing import Sample, Spec


def _scan(*shape, dim=-1, a_shape=None, state=False, cu=None, reverse=False, complex_=False, last=True):
    """Decays between 0.4 and 1, their signs mixed; of complex numbers the absolute value."""

    def build(f):
        decay = f.positive(*(a_shape or shape), low=0.4, high=1.0)
        if complex_:
            a, b = torch.polar(decay, f.param(*decay.shape, scale=2)), f.complex(*shape)
        else:
            signs = torch.where(f.param(*decay.shape) < -0.8, -1.0, 1.0)
            a, b = (decay * signs).to(f.dtype), f.io(*shape)
        rest = [n for i, n in enumerate(shape) if i != dim % len(shape)]
        rest = rest if cu is None else [len(cu) - 1, *rest[1:]]
        initial = (f.complex if complex_ else f.param)(*rest) if state else None
        return (a, b), dict(
            dim=dim, initial_state=initial, cu_seqlens=None if cu is None else f.integers(cu), reverse=reverse,
            return_last_state=last,
        )  # fmt: skip

    return build


SPECS = {
    "diag_scan": Spec(
        (
            Sample("plain", _scan(2, 5, 7, last=False)),
            Sample("channels_last", _scan(2, 67, 21, dim=1, state=True)),
            Sample("rows", _scan(3, 11, 70, state=True, reverse=True)),
            Sample("one_row", _scan(1, 600, dim=1, state=True)),
            Sample("shared_decay", _scan(2, 9, 3, 19, dim=1, a_shape=(1, 9, 3, 1), state=True)),
            Sample("constant_decay", _scan(2, 18, 33, a_shape=(1, 18, 1))),
            Sample("packed", _scan(1, 150, 5, dim=1, cu=[0, 1, 64, 64, 131, 150], state=True)),
            Sample("packed_rows", _scan(1, 9, 81, cu=[0, 70, 81], reverse=True)),
            Sample("complex", _scan(2, 70, 6, dim=1, complex_=True, state=True)),
            Sample("complex_rows", _scan(1, 5, 67, complex_=True, reverse=True, state=True)),
        ),
        parameters_only=True,
        rounding_of_saved=1,
        reorders=True,
    ),
}
