"""The CUDA kernel of one decoding step against the oracle, run by the host emulator of scalekern._C.

Shape letters: S slots, B batch, H heads, P head dim, N states, G groups. A GPU of one processor has 6 places for blocks:
from 7 groups of 4 rows on a block walks over several, and from 17 on over more than are on their way at once.
"""

import cuda_emulation as emulated
import pytest
import torch
from test_cuda_emulated import TOLERANCE, assert_all_close, doubled

from scalekern.reference.selective_state_update import selective_state_update_op as reference

pytest.importorskip("scalekern._C", reason="the pybind11 module was not built (setup.py says why)")

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def inputs(
    B, H, P, N, dtype=F32, state_dtype=F32, *, groups=1, slots=None, indices=None, expanded_A=False, optional="Dzb"
):  # fmt: skip
    """Arguments of the op. Rows of the batch differ in scale, so that one in another's place is seen."""
    generator = torch.Generator().manual_seed(B + H + P + N)
    real = F64 if dtype == F64 else F32
    normal = lambda *shape, kind=dtype: torch.randn(*shape, dtype=F64, generator=generator).to(kind)
    take = lambda key, value: value if key in optional else None
    A = -normal(H, P, 1 if expanded_A else N, kind=real).abs()
    x = normal(B, H, P) * torch.linspace(0.5, 1.5, B)[:, None, None].to(dtype)
    return [
        normal(slots or B, H, P, N, kind=state_dtype), x, normal(B, H, P), A.expand(H, P, N), normal(B, groups, N),
        normal(B, groups, N), take("D", normal(H, P, kind=real)), take("z", normal(B, H, P)),
        take("b", normal(H, P, kind=real)), indices, True,
    ]  # fmt: skip


def check(args, **options):
    """Output and states against the oracle's; slots that no row names keep their bytes, and padding gets zeros."""
    mine, oracle = [args[0].clone(), *args[1:]], doubled([args[0].clone(), *args[1:]])
    got, want = emulated.selective_state_update(*mine, **options), reference(*oracle)
    assert_all_close([got], [want], ["out"], TOLERANCE[args[1].dtype])
    assert_all_close([mine[0]], [oracle[0]], ["state"], max(TOLERANCE[args[0].dtype], TOLERANCE[args[3].dtype]))
    for row, of_row in zip(got, want):  # none hides behind the others
        assert (row.double() - of_row).norm() <= 4 * TOLERANCE[args[1].dtype] * of_row.norm()
    indices = args[9]
    if indices is not None:
        untouched = [i for i in range(len(args[0])) if i not in indices]
        assert torch.equal(mine[0][untouched], args[0][untouched]) and not got[indices < 0].count_nonzero()
    return got, mine[0]


@pytest.mark.parametrize(
    "case",
    [
        dict(H=1, P=9, N=16),
        dict(H=4, P=3, N=5, dtype=BF16, groups=2),
        dict(H=2, P=3, N=150, dtype=F16, state_dtype=BF16, expanded_A=True),
        dict(H=2, P=11, N=16, dtype=BF16, slots=7, indices=torch.tensor([-1, 4, 0, 6, -1])),
        dict(H=2, P=3, N=128, dtype=F16, state_dtype=F16, expanded_A=True, optional="z"),
        dict(H=1, P=40, N=16, dtype=F64, state_dtype=F64, optional=""),
        dict(H=1, P=5, N=8, state_dtype=F16, slots=7, indices=torch.tensor([3, -1, 0, 6, 2])),
    ],
    ids=lambda c: f"N{c['N']}_{str(c.get('dtype', F32))[6:]}_{str(c.get('state_dtype', F32))[6:]}",
)
def test_a_few_rows(case):
    check(inputs(5, **case))


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("B", [1, 4, 27, 101, 124])
def test_a_block_walks_over_the_batch(B, order):
    check(inputs(B, 1, 3, 16), order=order)


@pytest.mark.parametrize("state_dtype", [F32, BF16])
@pytest.mark.parametrize("N", [4, 12, 16, 20, 64, 128])
def test_lanes_of_a_channel(N, state_dtype):
    """4 N / 16 of them, some of which may have no states: what they would read or write is another channel's."""
    check(inputs(50, 2, 5, N, BF16, state_dtype, groups=2), order="shuffled")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_slots_and_padding(order, index_dtype):
    """Slots in any order, whole groups of padding among them, the first and the last row too."""
    indices = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:70]
    indices[[0, 5, 31, 69]] = -1
    indices[8:20] = -1
    spaced = torch.stack([indices, indices + 1000], 1).to(index_dtype)[:, 0]
    check(inputs(70, 1, 6, 16, F16, slots=90, indices=spaced), order=order)


@pytest.mark.parametrize("P", [1, 31, 33, 257])
@pytest.mark.parametrize("processors", [1, 3, 132])
def test_more_and_fewer_channels_than_places(P, processors):
    check(inputs(33, 1, P, 16), processors=processors)


@pytest.mark.parametrize("part", ["state", "A", "B"])
def test_quads_that_are_not_aligned(part):
    """Elements one by one, over several groups as well."""
    args = inputs(45, 2, 3, 16)
    at = {"state": 0, "A": 3, "B": 4}[part]
    wide = torch.full((*args[at].shape[:-1], 17), float("nan"))
    wide[..., 1:] = args[at]
    args[at] = wide[..., 1:]
    check(args)


def test_neighbours_of_a_state_are_not_written():
    args = inputs(30, 1, 5, 12)
    wide = torch.full((30, 1, 5, 16), 7.0)
    wide[..., :12] = args[0]
    want = [args[0].double(), *doubled(args[1:])]
    reference(*want)
    emulated.selective_state_update(wide[..., :12], *args[1:])
    assert (wide[..., 12:] == 7).all() and (wide[..., :12] - want[0]).norm() <= 2e-6 * want[0].norm()


def test_infinity_stays_in_its_row():
    args = inputs(40, 1, 3, 16)
    args[0][17, 0, 1, 5] = float("inf")
    got, want = emulated.selective_state_update(args[0].clone(), *args[1:]), reference(*doubled(args))
    assert torch.equal(got.isfinite(), want.isfinite()) and (~got.isfinite()).sum() == 1
