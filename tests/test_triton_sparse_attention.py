"""The Triton kernels of sparse_attention, run by Triton's interpreter on CPU tensors, against a float64 masked softmax.

Needs TRITON_INTERPRET=1 in the environment before anything imports Triton, like tests/test_triton_interpret.py.
"""

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("runs only with TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from scalekern import masks  # noqa: E402
from scalekern.masks import causal, segments, sink, window  # noqa: E402
from scalekern.reference.hstu_attention import bucket_edges  # noqa: E402
from scalekern.triton_kernels import bias_tables  # noqa: E402
from scalekern.triton_kernels import mask_device as dev  # noqa: E402
from scalekern.triton_kernels import sparse_attention as attention  # noqa: E402
from scalekern.triton_kernels import sparse_attention_bwd as attention_bwd  # noqa: E402
from scalekern.triton_kernels import sparse_attention_dq as attention_dq  # noqa: E402
from scalekern.triton_kernels.sparse_attention import sparse_attention_fwd  # noqa: E402
from scalekern.triton_kernels.sparse_attention_bwd import sparse_attention_bwd  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 2e-3, BF16: 1.2e-2}
NEVER = 2**31 - 1

# --- masks, written down as code tensors and evaluated one pair at a time ---------------------------------------------


def leaf(opcode, *numbers, swap=0, dx=0, dy=0):
    return [opcode, swap, dx, dy, *numbers]


def assemble(*heads, tables=(), batches=1):
    """A code tensor of one program a head (a program: a list of instructions; the number 1000 + n is table n)."""
    structures = list(dict.fromkeys(tuple((i[0], i[1] if len(i) > 1 else 0) for i in head) for head in heads))
    sizes = [2 + dev.INSTRUCTION * len(head) for head in heads]
    offsets = [2 + len(heads) + sum(sizes[:n]) for n in range(len(heads))]
    starts = [offsets[-1] + sizes[-1] + sum(map(len, tables[:n])) for n in range(len(tables))]
    code = [len(heads), batches, *offsets]
    for head in heads:
        key = tuple((i[0], i[1] if len(i) > 1 else 0) for i in head)
        code += [len(head), structures.index(key)]
        for one in head:
            one = [starts[x - 1000] if 1000 <= x < 1100 else x for x in one]
            code += [*one, *[0] * (dev.INSTRUCTION - len(one))]
    return torch.tensor(code + [x for table in tables for x in table], dtype=torch.int32)


def allowed(code, b, h, q, k):
    """The mask's definition, for one pair."""
    code = code if isinstance(code, list) else code.tolist()
    o = code[2 + (h if code[0] > 1 else 0)]
    stack = []
    for i in range(code[o]):
        opcode, swap, dx, dy, *p = code[o + 2 + 12 * i : o + 14 + 12 * i]
        x, y = ((k, q) if swap else (q, k))[0] + dx, ((k, q) if swap else (q, k))[1] + dy
        at = lambda n: 0 if n == 1 else b
        if opcode in (dev.AND, dev.OR):
            right, left = stack.pop(), stack.pop()
            value = left and right if opcode == dev.AND else left or right
        elif opcode == dev.NOT:
            value = not stack.pop()
        elif opcode == dev.ALL:
            value = True
        elif opcode == dev.CAUSAL:
            value = y <= x
        elif opcode == dev.WINDOW:
            value = (p[0] < 0 or x - y <= p[0]) and (p[1] < 0 or y - x <= p[1])
        elif opcode == dev.BELOW:
            value = 0 <= y < p[0]
        elif opcode == dev.PREFIX:
            value = 0 <= y < code[p[0] + at(p[1])]
        elif opcode == dev.BLOCKS:
            value = x >= 0 and 0 <= y < code[p[0] + min(x, p[1] - 1)]
        elif opcode == dev.SAME:
            value = 0 <= x < p[1] and 0 <= y < p[3]
            if value:
                mine = code[p[0] + at(p[4]) * p[1] + x]
                value = mine >= 0 and mine == code[p[2] + at(p[4]) * p[3] + y]
        elif opcode == dev.DILATED:
            value = (x - y) % p[0] == 0
        elif opcode == dev.NEIGHBOR:
            value = 0 <= x < p[0] * p[1] and 0 <= y < p[0] * p[1]
            for X, Y, size, kernel, d in (
                (x // p[1], y // p[1], p[0], p[2], p[4]), (x % p[1], y % p[1], p[1], p[3], p[5]),
            ):  # fmt: skip
                line = [z for z in range(size) if z % d == X % d]
                start = min(max(X // d - kernel // 2, 0), max(len(line) - kernel, 0))
                value = value and Y in line[start : start + kernel]
        elif opcode == dev.DENSE:
            X, Y, words = x // p[5], y // p[6], -(-p[2] // 32)
            value = x >= 0 and y >= 0 and X < p[1] and Y < p[2]
            if value:
                head = at(p[3]) * p[4] + (0 if p[4] == 1 else h)
                value = bool(code[p[0] + (head * p[1] + X) * words + Y // 32] >> Y % 32 & 1)
        elif opcode == dev.ROWS:
            value = 0 <= x < p[1] and code[p[0] + at(p[2]) * p[1] + x] != 0
        stack.append(value)
    return stack.pop()


def dense(code, B, H, Lq, Lk):
    code = code.tolist()
    pairs = itertools.product(range(B if code[1] > 1 else 1), range(H if code[0] > 1 else 1), range(Lq), range(Lk))
    found = torch.tensor([allowed(code, *pair) for pair in pairs]).view(code[1] if code[1] > 1 else 1, -1, Lq, Lk)
    return found.expand(B, H, Lq, Lk)




@triton.jit
def _evaluate(out_ptr, code_ptr, b, h, Lq, Lk, PARAMS: tl.constexpr, MASK: tl.constexpr, TRANSPOSED: tl.constexpr):
    p = PARAMS(code_ptr, tl.load(code_ptr + 2 + tl.where(tl.load(code_ptr) == 1, 0, h)))
    x, y = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    if TRANSPOSED:
        tl.store(out_ptr + y * Lk + x, MASK(code_ptr, p, b, h, y, x).to(tl.uint8), mask=(y < Lq) & (x < Lk))
    else:
        tl.store(out_ptr + x * Lk + y, MASK(code_ptr, p, b, h, x, y).to(tl.uint8), mask=(x < Lq) & (y < Lk))


SEGMENTS = [0, 0, 1, 1, 1, -1, -1, 2, 2, 2, 0, 3]  # 12 tokens
BITS = [0x5A5A5A5A, -3, 7, 1 << 30, -(2**31), 99, 123456789, -123456789] * 20
PROGRAMS = {  # of heads in turn, and their tables
    "all": ([[leaf(dev.ALL)]], []),
    "causal": ([[leaf(dev.CAUSAL, dx=2, dy=-1)]], []),
    "window": ([[leaf(dev.WINDOW, 3, 1)], [leaf(dev.WINDOW, -1, 2)], [leaf(dev.WINDOW, 4, -1)]], []),
    "below": ([[leaf(dev.BELOW, 4, dy=2)], [leaf(dev.BELOW, 4, swap=1, dy=-2)]], []),
    "prefix": ([[leaf(dev.PREFIX, 1000, 2)], [leaf(dev.PREFIX, 1001, 1, swap=1)]], [[4, 9], [5]]),
    "blocks": (
        [[leaf(dev.BLOCKS, 1000, 9, dx=-1)], [leaf(dev.BLOCKS, 1000, 9, swap=1, dy=1)]],
        [[1, 3, 3, 6, 6, 6, 7, 7, NEVER]],
    ),
    "same": (
        [[leaf(dev.SAME, 1000, 12, 1001, 6, 2, dx=1)], [leaf(dev.SAME, 1001, 12, 1000, 12, 1, swap=1)]],
        [SEGMENTS + SEGMENTS[::-1], [0, 1, 2, 3, -1, 1] * 2],
    ),
    "dilated": ([[leaf(dev.DILATED, 3, dx=-2)]], []),
    "neighbor": (
        [[leaf(dev.NEIGHBOR, 4, 3, 3, 2, 1, 1)], [leaf(dev.NEIGHBOR, 3, 7, 3, 5, 2, 3, dx=1)],
         [leaf(dev.NEIGHBOR, 3, 4, 5, 3, 1, 2, swap=1)]], [],
    ),
    "dense": (
        [[leaf(dev.DENSE, 1000, 10, 40, 2, 4, 1, 1)], [leaf(dev.DENSE, 1000, 5, 33, 1, 1, 4, 3, dx=-2, dy=1)]], [BITS],
    ),
    "rows": (
        [[leaf(dev.ROWS, 1000, 8, 2)], [leaf(dev.ROWS, 1000, 8, 1, swap=1, dx=-3)]], [[0, 1, 1, 0, 2, 0, 1, 0] * 2]
    ),
    "logic": (
        [[leaf(dev.CAUSAL), leaf(dev.WINDOW, 5, -1), leaf(dev.BELOW, 3), [dev.OR], [dev.AND]],
         [leaf(dev.CAUSAL), [dev.NOT], leaf(dev.DILATED, 2), [dev.OR]], [leaf(dev.CAUSAL)]], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("name", PROGRAMS)
def test_mask_function(name, transposed):
    """Every opcode, with shifts and swapped coordinates, alone and on a branch, equals its definition."""
    programs, tables = PROGRAMS[name]
    B, H, Lq, Lk = 2, 4, 14, 41
    heads = [programs[h % len(programs)] for h in range(H)] if len(programs) > 1 else programs
    code = assemble(*heads, tables=tables, batches=B)
    functions = dev.functions_of(dev.structures_of(code))
    expected = dense(code, B, H, Lq, Lk)
    for b, h in itertools.product(range(B), range(H)):
        found = torch.full((Lq, Lk), 7, dtype=torch.uint8)
        _evaluate[(1,)](found, code, b, h, Lq, Lk, *functions, transposed)
        assert torch.equal(found, expected[b, h].to(torch.uint8)), (b, h)


# --- the kernels ------------------------------------------------------------------------------------------------------


def randn(*shape, dtype=F32):
    """Normal numbers, each leading index with its own scale, so that permuted batches or heads are seen."""
    value = torch.randn(shape, dtype=F64)
    return (value * torch.rand(shape[:2] + (1,) * (len(shape) - 2)).add(0.5)).to(dtype)


def oracle(q, k, v, mask, bias, sinks, scale, softcap, silu, norm, **tables):
    """(out, lse) of a dense masked softmax."""
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("bhqp,bhkp->bhqk", q, k.repeat_interleave(group, 1)) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias
    s = s + rendering(**tables)
    values = v.repeat_interleave(group, 1)
    if silu:
        p, lse = torch.where(mask, torch.nn.functional.silu(s) * norm, 0), torch.zeros(q.shape[:3], dtype=q.dtype)
    else:
        s = s.masked_fill(~mask, -torch.inf)
        extra = [] if sinks is None else [sinks[None, :, None, None].expand(*s.shape[:3], 1)]
        # Rows without a key: their logits are replaced before the logarithm, so that no gradient is NaN.
        empty = ~mask.any(3) if sinks is None else torch.zeros_like(mask[..., 0])
        lse = torch.cat([s.masked_fill(empty[..., None], 0), *extra], 3).logsumexp(3).masked_fill(empty, -torch.inf)
        p = torch.where(mask, (s - lse.masked_fill(empty, 0)[..., None]).exp(), 0)
    return torch.einsum("bhqk,bhkp->bhqp", p, values), lse


def rendering(position_table=None, q_pos=None, k_pos=None, time_table=None, q_time=None, k_time=None, edges=None):
    """(H or 1, Lq, Lk): the tables' bias, or 0."""
    bias = 0
    if position_table is not None:
        R = position_table.shape[1] // 2
        bias = position_table[:, (k_pos.long() - q_pos.long()[:, None]).clamp(-R, R) + R]
    if time_table is not None:
        apart = (q_time[:, None] - k_time).abs().clamp(min=1)
        bias = bias + time_table[:, (edges <= apart[..., None]).sum(2)]
    return bias


def tables(Lq, Lk, position=None, time=None, dtype=F32, ordered=True):
    """position, time: (rows, entries). Positions of packed sequences of 16, or without order; times of a walk."""
    x = {}
    if position:
        x |= dict(
            position_table=torch.randn(position, dtype=dtype), q_pos=torch.arange(3, 3 + Lq).int() % 16,
            k_pos=torch.arange(Lk).int() % 16 if ordered else torch.randint(-9, 30, (Lk,)).int(),
        )  # fmt: skip
    if time:
        walk = torch.randint(0, 400, (max(Lq, Lk),)).cumsum(0)
        edges = bucket_edges(time[1] - 1) if ordered else torch.randint(1, 9000, (time[1] - 1,)).sort()[0]
        x |= dict(time_table=torch.randn(time, dtype=dtype), q_time=walk[:Lq] + 1, k_time=walk[:Lk], edges=edges)
    return x


NAMES = "position_table q_pos k_pos time_table q_time k_time edges".split()


def inputs(B=1, H=2, Hkv=1, Lq=37, Lk=45, P=8, PV=8, dtype=F32, bias=None, sinks=False, bias_dtype=None,
           position=(None, 0), time=(None, 0), ordered=True):  # fmt: skip
    real = F64 if dtype == F64 else F32
    position, time = ((1 if rows == "shared" else H, size) if rows else None for rows, size in (position, time))
    return dict(
        q=randn(B, H, Lq, P, dtype=dtype), k=randn(B, Hkv, Lk, P, dtype=dtype), v=randn(B, Hkv, Lk, PV, dtype=dtype),
        bias=None if bias is None else randn(*bias, Lq, Lk, dtype=bias_dtype or dtype),
        sinks=torch.randn(H).to(real) if sinks else None,
    ) | tables(Lq, Lk, position, time, real, ordered)  # fmt: skip


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def arguments(x, code, plan):
    q, k, v, bias, sinks = (x[name] for name in "q k v bias sinks".split())
    return q, k, v, code, plan, bias, sinks, *(x.get(name) for name in NAMES)


def forward(x, code, plan, scale=0.3, softcap=None, silu=False, norm=1.0):
    B, H, Lq, _ = x["q"].shape
    out = poisoned(B, H, Lq, x["v"].shape[3], dtype=x["q"].dtype)
    lse = poisoned(B, H, Lq, dtype=F64 if out.dtype == F64 else F32)
    sparse_attention_fwd(out, lse, *arguments(x, code, plan), scale, softcap, silu, norm)
    return out, lse


def error(found, expected):
    """Relative L2 error by the reference's norm: an all-zero result fails."""
    assert torch.equal(found.isfinite(), expected.isfinite())
    found, expected = (torch.where(x.isfinite(), x.double(), 0) for x in (found, expected))
    norm = expected.norm()
    return float((found - expected).norm() / norm if norm > 0 else found.norm())


def check(x, mask, block=(32, 32), tolerance=None, **options):
    """Forward and every gradient."""
    (B, H, Lq, _), Lk = x["q"].shape, x["k"].shape[2]
    code, plan = mask.code("cpu"), mask.plan(Lq, Lk, block)
    mask = mask.to_dense(Lq, Lk).expand(B, H, Lq, Lk)
    numbers = dict(scale=0.3, softcap=None, silu=False, norm=1.0) | options
    wide = lambda t: t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t
    x64 = {name: wide(t) for name, t in x.items()}
    expected = oracle(**x64, mask=mask, **numbers)
    found = forward(x, code, plan, **numbers)
    dout, dlse = randn(*expected[0].shape, dtype=found[0].dtype), randn(*expected[1].shape, dtype=found[1].dtype)
    names = [name for name, t in x64.items() if t is not None and t.requires_grad]
    # An empty row's lse is constant: its gradient is multiplied by nothing.
    loss = (expected[0] * dout).sum() + (expected[1].where(expected[1].isfinite(), 0) * dlse).sum()
    expected = [t.detach() for t in expected] + list(torch.autograd.grad(loss, [x64[name] for name in names]))
    gradients = backward(x, dout, None if numbers["silu"] else dlse, *found, code, plan, **numbers)
    tolerance = tolerance or TOLERANCE[x["q"].dtype]
    for name, f, e in zip(("out", "lse", *names), [*found, *gradients], expected, strict=True):
        assert error(f, e) <= tolerance, (name, error(f, e), tolerance)


def backward(x, dout, dlse, out, lse, code, plan, **numbers):
    names = "q k v bias sinks position_table time_table".split()
    gradients = [None if x.get(name) is None else torch.full_like(x[name], float("nan")) for name in names]
    sparse_attention_bwd(*gradients, dout, dlse, out, lse, *arguments(x, code, plan), *numbers.values())
    return [g for g in gradients if g is not None]


LOCAL = causal & (window(5, 0) | sink(3))
CASES = {
    "local": (dict(), LOCAL, {}),
    "one": (dict(H=1, Lq=1, Lk=1, P=1, PV=1), causal, {}),
    "empty rows": (dict(Lq=45, Lk=20), causal.shift(-7, 0) & window(15, -1), {}),
    "float64": (
        dict(dtype=F64, B=2, Lq=33, Lk=40, bias=(2, 1), sinks=True, P=5, PV=17), masks.per_head([LOCAL, causal]),
        dict(softcap=2.0),
    ),
    "float16": (dict(dtype=F16, P=80, PV=40, Lq=64, Lk=64), causal, dict(softcap=1.5)),
    "bfloat16": (dict(dtype=BF16, B=2, Lq=33, Lk=40, sinks=True, bias=(1, 2)), LOCAL, {}),
    "heads": (dict(H=4, Hkv=2, Lq=33, Lk=40, P=3, PV=130), masks.per_head([LOCAL, causal, ~sink(0), causal]), {}),
    "silu": (dict(Hkv=2, bias=(1, 1)), LOCAL, dict(silu=True, norm=1 / 45)),
    "tables": (
        dict(H=3, position=("own", 21), time=("shared", 40), bias=(1, 1), Lk=70),
        segments(torch.arange(70)[None] // 16), dict(silu=True, norm=0.2),
    ),
    "tables without order": (
        dict(B=2, Lq=20, Lk=40, position=("shared", 15), time=("own", 80), ordered=False, sinks=True, bias=(2, 1)),
        LOCAL, dict(softcap=2.0),
    ),
    "position table of one": (dict(dtype=F64, position=("own", 1), Lq=20, Lk=20), causal, {}),
    "time table of one": (dict(dtype=BF16, time=("own", 1), Lq=20, Lk=20), causal, {}),
    "silu float64": (dict(dtype=F64), causal, dict(silu=True, norm=0.1, softcap=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    torch.manual_seed(0)
    shapes, mask, options = CASES[name]
    check(inputs(**shapes), mask, **options)


def results(x, mask, dout, **numbers):
    """(out, lse, gradients ..)"""
    code, plan = mask.code("cpu"), mask.plan(x["q"].shape[2], x["k"].shape[2], (32, 32))
    numbers = dict(scale=0.3, softcap=None, silu=False, norm=1.0) | numbers
    found = forward(x, code, plan, **numbers)
    return *found, *backward(x, dout, None, *found, code, plan, **numbers)


@pytest.mark.parametrize("silu, value", ((False, float("nan")), (False, float("inf")), (True, float("nan"))))
def test_what_no_row_sees_reaches_nothing(value, silu):
    """Keys of no segment inside partial tiles, and what lies beyond the last channel and row."""
    torch.manual_seed(1)
    mask = segments(torch.tensor([[0] * 9 + [-1] * 4 + [1] * 27])) & causal
    x, dout = inputs(Lq=40, Lk=40, P=3, PV=5), randn(1, 2, 40, 5)
    clean = results(x, mask, dout, silu=silu)
    for name in ("k", "v"):
        x[name][:, :, 9:13] = value
        padded = torch.full((1, 1, 41, x[name].shape[3] + 1), value)
        padded[:, :, :-1, :-1] = x[name]
        x[name] = padded[:, :, :-1, :-1]
    for name, found, expected in zip("out lse dq dk dv".split(), results(x, mask, dout, silu=silu), clean):
        assert error(found, expected) <= 1e-6, name  # the careful pass adds in another order


def test_what_queries_beyond_the_last_would_see_reaches_nothing():
    torch.manual_seed(4)
    x, dout = inputs(Lq=9, Lk=20, P=3, PV=5), randn(1, 2, 9, 5)
    clean = results(x, causal, dout)
    for name in ("k", "v"):
        x[name][:, :, 9:] = float("nan")
    for name, found, expected in zip("out lse dq dk dv".split(), results(x, causal, dout), clean):
        assert error(found, expected) <= 1e-6, name


@pytest.mark.parametrize("where", ("k", "v", "q", "dout"))
def test_what_some_rows_see_reaches_those(where):
    """A NaN in one segment reaches what it should there, and no other segment, though they share tiles."""
    torch.manual_seed(2)
    mask = segments(torch.tensor([[0] * 9 + [1] * 11 + [2] * 20])) & causal
    x, dout = inputs(Lq=40, Lk=40, P=3, PV=5), randn(1, 2, 40, 5)
    clean = results(x, mask, dout)
    (dout if where == "dout" else x[where])[0, 0, 15, 1] = float("nan")
    found = dict(zip("out lse dq dk dv".split(), results(x, mask, dout)))
    reached = {"v": "out dq dk", "dout": "dq dk dv"}.get(where, "out lse dq dk dv").split()
    for (name, value), expected in zip(found.items(), clean):
        for part in (slice(0, 9), slice(20, 40)):
            assert error(value[:, :, part], expected[:, :, part]) <= 1e-6, name
        assert value.isnan().any() == (name in reached), name
    if where in "kv":  # rows from the key on, in all heads of the group; of v in its channel only
        rows = found["out"].isnan().any(3)
        assert rows[:, :, 15:20].all() and not rows[:, :, :15].any() and not rows[:, :, 20:].any()
        assert where == "k" or found["out"][..., [0, 2, 3, 4]].isfinite().all()


def test_infinite_values():
    """A visible Inf or -Inf in v, and both, come out as the sum says."""
    torch.manual_seed(3)
    x = inputs(Lq=40, Lk=40, P=3, PV=5)
    x["v"][0, 0, 7, 0], x["v"][0, 0, 20, 0], x["v"][0, 0, 30, 2] = float("inf"), -float("inf"), -float("inf")
    out, _ = forward(x, causal.code("cpu"), causal.plan(40, 40, (32, 32)))
    first, third, inf = out[..., 0], out[..., 2], float("inf")
    assert first[..., :7].isfinite().all() and (first[..., 7:20] == inf).all() and first[..., 20:].isnan().all()
    assert third[..., :30].isfinite().all() and (third[..., 30:] == -inf).all()
    assert out[..., [1, 3, 4]].isfinite().all()


def test_huge_scores():
    torch.manual_seed(4)
    x = inputs(Lq=40, Lk=40, dtype=F64)
    x["q"], x["k"] = x["q"] * 1e4, x["k"] * 1e3
    check(x, causal, tolerance=1e-8)  # scores of 1e8 have errors of 1e-8


def test_strides_64_bit_offsets_and_determinism(monkeypatch):
    """Any strides give the bits of contiguous tensors, as do 64-bit offsets."""
    torch.manual_seed(5)
    mask = masks.per_head([LOCAL, causal])
    x, dout = inputs(B=2, Lq=33, Lk=40, bias=(2, 2), sinks=True), randn(2, 2, 33, 8)
    x["k"], x["bias"] = x["k"][:1].repeat(2, 1, 1, 1), x["bias"][:1, :1].repeat(2, 2, 1, 1)
    first = results(x, mask, dout)
    y = {
        "q": x["q"].transpose(1, 3).contiguous().transpose(1, 3), "k": x["k"][:1].expand(2, -1, -1, -1),
        "v": x["v"].repeat_interleave(2, 3)[..., ::2],
        "bias": x["bias"][:1, :1].mT.contiguous().mT.expand(2, 2, -1, -1),
        "sinks": x["sinks"].repeat_interleave(3)[::3],
    }  # fmt: skip
    for a, b in zip(first, results(y, mask, dout.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0))):
        assert torch.equal(a, b)
    monkeypatch.setenv("SCALEKERN_FORCE_INT64", "1")
    for a, b in zip(first, results(x, mask, dout)):
        assert torch.equal(a, b)


def test_tiles_smaller_than_the_plans(monkeypatch):
    """A plan of 64 x 64 walked in tiles of 32 x 16 and others."""
    torch.manual_seed(6)
    small = lambda *_: {"BLOCK_Q": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(attention, "_default", small)
    for module in (attention_dq, attention_bwd):
        monkeypatch.setattr(module, "default", small)
    check(inputs(Lq=100, Lk=70, H=1), causal & window(40, -1), block=(64, 64))


def test_the_check_can_fail(monkeypatch):
    """For the output, and for each gradient in turn."""
    torch.manual_seed(7)
    x, spoils = inputs(Lq=17, Lk=17, bias=(1, 2), sinks=True), (lambda t: t * 0, lambda t: t * 1.001)
    for number in range(-1, 5):
        original, which = (forward, 0) if number < 0 else (backward, number)

        def spoiled(*args, original=original, which=which, **numbers):
            return [spoils[which % 2](t) if i == which else t for i, t in enumerate(original(*args, **numbers))]

        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setitem(globals(), original.__name__, spoiled)
            check(x, causal)
