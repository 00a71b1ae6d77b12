"""HSTU's attention against its oracle, and the oracle against a padded rendering of the equations."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET, kernel_places

import scalekern
from scalekern import reference
from scalekern.testing import assert_close

LENGTHS = (0, 1, 9, 17, 2)


def inputs(H=2, P=4, Pv=3, dtype=torch.float64, seed=0, tables=True):
    g = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    args = randn(total, H, P), randn(total, H, P), randn(total, H, Pv), offsets
    found = {}
    if tables:
        time = torch.cat([torch.randint(0, 10**6, (n,), generator=g).sort().values for n in LENGTHS])
        found = {"time": time, "time_table": randn(H, 41), "position_table": randn(2 * 9 + 1)}
    return args, found


OPTIONS = {
    "plain": {},
    "not_causal": {"causal": False},
    "targets": {"num_targets": torch.tensor([0, 1, 3, 4, 1])},
    "targets_not_causal": {"num_targets": torch.tensor([0, 1, 3, 4, 1]), "causal": False},
    "window": {"max_attn_len": 4},
    "window_not_causal": {"max_attn_len": 4, "causal": False, "num_targets": torch.tensor([0, 0, 3, 2, 0])},
    "full_tail": {"max_attn_len": 3, "min_full_attn_len": 4, "num_targets": torch.tensor([0, 0, 2, 5, 0])},
    "full_tail_not_causal": {"max_attn_len": 3, "min_full_attn_len": 4, "causal": False},
    "contextual": {"contextual_len": 3, "num_targets": torch.tensor([0, 0, 2, 5, 0])},
    "contextual_window": {"contextual_len": 2, "max_attn_len": 5, "min_full_attn_len": 2},
    "contextual_not_causal": {"contextual_len": 2, "causal": False, "num_targets": torch.tensor([0, 1, 2, 5, 0])},
    "by_length": {"normalize": "length"},
    "by_scaling_len": {"normalize": "scaling_len", "scaling_len": 11, "alpha": 0.7},
}

TRIED = ("contextual_window", "window_not_causal") if INTERPRET else tuple(OPTIONS)
if INTERPRET:
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("place", kernel_places())
@pytest.mark.parametrize("options", [OPTIONS[o] for o in TRIED], ids=TRIED)
def test_agrees_with_the_oracle(options, place):
    args, tables = inputs()
    leaves = [*args[:3], tables["time_table"], tables["position_table"]]
    found = []
    weight = torch.randn(args[2].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for package in (scalekern, reference):
        moved = lambda x: x.to(place[0]) if isinstance(x, torch.Tensor) else x
        mine = [moved(x).clone().requires_grad_() for x in leaves]
        with scalekern.backend(place[1]):
            out = package.hstu_attention(
                *mine[:3], moved(args[3]), max_len=20, time=moved(tables["time"]), time_table=mine[3],
                position_table=mine[4], **{n: moved(x) for n, x in options.items()},
            )  # fmt: skip
            found.append([out, *torch.autograd.grad((out * moved(weight)).sum(), mine)])
    assert found[1][0].norm() > 0.1
    for a, e in zip(*found):
        assert_close(a, e, tolerance=1e-12)


LONG = {
    "contextual": {"contextual_len": 70},
    "few_contextual": {"contextual_len": 3, "max_attn_len": 100},
    "full_tail": {"max_attn_len": 20, "min_full_attn_len": 90},
    "full_tail_not_causal": {"max_attn_len": 20, "min_full_attn_len": 90, "causal": False},
    "all": {
        "contextual_len": 70,
        "max_attn_len": 40,
        "min_full_attn_len": 100,
        "num_targets": torch.tensor([30, 0, 80]),
    },
    "targets_not_causal": {"num_targets": torch.tensor([100, 0, 150]), "causal": False, "max_attn_len": 30},
}


@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
def test_sequences_of_many_tiles(options):
    """What a row sees rises and falls from row to row: no tile of 64 may be taken for empty, or full, that is not."""
    offsets = torch.tensor([0, 300, 301, 500])
    g = torch.Generator().manual_seed(4)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    leaves = [*(randn(500, 2, 4) for _ in range(3)), randn(2, 31), randn(41)]
    time = torch.randint(0, 10**6, (500,), generator=g)
    found = []
    for package in (scalekern, reference):
        q, k, v, *tables = mine = [x.clone().requires_grad_() for x in leaves]
        out = package.hstu_attention(
            q, k, v, offsets, max_len=300, time=time, time_table=tables[0], position_table=tables[1], **options
        )
        found.append([out, *torch.autograd.grad((out * out).sum(), mine)])
    for a, e in zip(*found):
        assert_close(a, e, tolerance=1e-12)


def padded(q, k, v, offsets, max_len, alpha, num_targets, max_attn_len, contextual_len):
    """The equations over padded sequences, as the paper's figures have them."""
    n, count = int((offsets[1:] - offsets[:-1]).max()), len(offsets) - 1
    pad = lambda x: torch.stack([F.pad(x[a:b], (0, 0, 0, 0, 0, n - (b - a))) for a, b in zip(offsets, offsets[1:])])
    Q, K, V = pad(q), pad(k), pad(v)
    scores = F.silu(torch.einsum("bihp,bjhp->bhij", Q, K) * alpha) / max_len
    allowed = torch.zeros(count, n, n, dtype=torch.bool)
    for s, i, j in itertools.product(range(count), range(n), range(n)):
        length = int(offsets[s + 1] - offsets[s])
        if i >= length or j >= length:
            continue
        history = length - (int(num_targets[s]) if num_targets is not None else 0)
        is_target = lambda t: t >= history
        if i < contextual_len:
            allowed[s, i, j] = not is_target(j) or i == j
        elif i == j:
            allowed[s, i, j] = True
        elif j < i and not (is_target(i) and is_target(j)):
            rank = lambda t: max(min(t, history) - contextual_len + 1, 0) if contextual_len else min(t, history)
            allowed[s, i, j] = not max_attn_len or rank(i) - rank(j) <= max_attn_len
    out = torch.einsum("bhij,bjhp->bihp", torch.where(allowed[:, None], scores, 0), V)
    return torch.cat([out[s, : int(b - a)] for s, (a, b) in enumerate(zip(offsets, offsets[1:]))])


@pytest.mark.parametrize(
    "targets, window, contextual",
    [(None, 0, 0), ([0, 1, 3, 4, 1], 0, 0), ([0, 0, 2, 5, 0], 4, 2), (None, 6, 2)],
)
def test_the_oracle_agrees_with_a_padded_rendering(targets, window, contextual):
    (q, k, v, offsets), _ = inputs(tables=False)
    targets = None if targets is None else torch.tensor(targets)
    plain = padded(q, k, v, offsets, 20, 0.5, targets, window, contextual)
    found = reference.hstu_attention(
        q, k, v, offsets, max_len=20, alpha=0.5, num_targets=targets, max_attn_len=window, contextual_len=contextual
    )
    assert_close(found, plain, tolerance=1e-13)


@pytest.mark.parametrize("options", [OPTIONS[o] for o in ("plain", "contextual_window", "by_length", "targets")])
def test_the_newest_rows_alone(options):
    """Inference: what they would be among all rows."""
    args, tables = inputs()
    args, tables = list(args), dict(tables)
    keep = [s for s, n in enumerate(LENGTHS) if n >= 2]
    bounds = args[3].tolist()
    index = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in keep])
    q, k, v = (x[index] for x in args[:3])
    tables["time"] = tables["time"][index]
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS[s] for s in keep)])
    options = {**options, **({"num_targets": options["num_targets"][keep]} if "num_targets" in options else {})}
    whole = scalekern.hstu_attention(q, k, v, offsets, max_len=20, **tables, **options)
    newest = torch.cat([torch.arange(end - 2, end) for end in offsets[1:].tolist()])
    part = scalekern.hstu_attention(q[newest], k, v, offsets, max_len=20, **tables, **options)
    assert_close(part, whole[newest], tolerance=1e-13)
    oracle = reference.hstu_attention(q[newest], k, v, offsets, max_len=20, **tables, **options)
    assert_close(oracle, part, tolerance=1e-13)


def test_buckets_follow_the_logarithm():
    edges = reference.hstu_attention.__globals__["bucket_edges"](40)
    for edge in edges.tolist():
        bucket = lambda d: int(torch.searchsorted(edges, torch.tensor(d), right=True))
        exact = lambda d: torch.floor(torch.tensor(float(d), dtype=torch.float64).log() / 0.301 + 1e-12)
        assert bucket(edge) == min(exact(edge), 40)
        assert edge == 1 or bucket(edge - 1) == min(exact(edge - 1), 40)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_lower_precision(dtype, tolerance):
    args, tables = inputs(dtype=dtype)
    upcast = lambda x: x.double() if x.is_floating_point() else x
    exact = reference.hstu_attention(*map(upcast, args), max_len=20, **{n: upcast(t) for n, t in tables.items()})
    assert_close(scalekern.hstu_attention(*args, max_len=20, **tables), exact, tolerance=tolerance)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"offsets": torch.tensor([0, 3])}, "offsets must rise from 0 to 29"),
        ({"time_table": None}, "time and time_table must be given together"),
        ({"position_table": torch.ones(4)}, "odd"),
        ({"normalize": "mean"}, "normalize must be one of"),
        ({"normalize": "scaling_len"}, "scaling_len must be"),
        ({"num_targets": torch.tensor([1])}, "num_targets must have shape"),
        ({"max_len": 0}, "max_len must be"),
        ({"max_len": None}, "max_len must be"),
        ({"alpha": "a"}, "alpha must be a number"),
        ({"max_attn_len": 1.5}, "max_attn_len must be an integer of at least 0"),
        ({"contextual_len": -1}, "contextual_len must be an integer of at least 0"),
        ({"min_full_attn_len": -1}, "min_full_attn_len must be an integer of at least 0"),
        ({"num_targets": "more"}, "num_targets must be from 0 to each sequence's length"),
        ({"num_targets": "less"}, "num_targets must be from 0 to each sequence's length"),
        ({"q": "newest"}, "q must have at most 0 rows of each sequence"),
    ],
)
def test_bad_input_is_named(changes, message):
    args, tables = inputs()
    lengths = args[3].diff()
    made = {"more": lengths + 1, "less": -torch.ones_like(lengths), "newest": args[0][: len(lengths)]}
    changes = {n: made.get(x, x) if isinstance(x, str) else x for n, x in changes.items()}
    named = {**dict(zip(("q", "k", "v", "offsets"), args)), "max_len": 20, **tables, **changes}
    with pytest.raises((TypeError, ValueError), match=f"hstu_attention: .*{message}"):
        scalekern.hstu_attention(**named)


def test_empty():
    q = torch.zeros(0, 2, 4, requires_grad=True)
    table = torch.zeros(3, requires_grad=True)
    out = scalekern.hstu_attention(q, q, q, torch.tensor([0, 0]), max_len=4, position_table=table)
    assert out.shape == (0, 2, 4)
    out.sum().backward()
    assert q.grad is not None and not table.grad.any()  # a parameter without a gradient stops DistributedDataParallel
