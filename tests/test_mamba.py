"""nn.Mamba against a rendering of the paper's equations in plain torch, which shares no code with the package.

Shape letters: B batch, L length, M model width, D channels, N state size, W filter width, R rank of the step size.
"""

import contextlib
import copy
import types

import pytest
import torch
import torch.nn.functional as F

from scalekern.nn import Mamba

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")


def paper(parameters, u):
    """Gu & Dao 2023, figure 3 (the block) and algorithm 2 (the selective SSM), one sequence u: (L, M) at a time.

    Discretization as in section 3.6: zero-order hold for A, and for B its Euler simplification.
    """
    p = parameters
    inner = p["D"].shape[0]
    states = p["A_log"].shape[1]
    rank = p["dt_proj.weight"].shape[1]
    A = -p["A_log"].exp()
    taps = p["conv1d.weight"][:, 0]
    width = taps.shape[1]
    bias = p.get("conv1d.bias", torch.zeros(inner, dtype=u.dtype))
    h = torch.zeros(inner, states, dtype=u.dtype)
    window = [torch.zeros(inner, dtype=u.dtype)] * width
    outputs = []
    for token in u:
        both = p["in_proj.weight"] @ token + p.get("in_proj.bias", 0)
        main, gate = both[:inner], both[inner:]
        window = [*window[1:], main]
        main = sum(taps[:, w] * window[w] for w in range(width)) + bias
        main = main * torch.sigmoid(main)
        selected = p["x_proj.weight"] @ main
        step = torch.log1p(torch.exp(p["dt_proj.weight"] @ selected[:rank] + p["dt_proj.bias"]))
        B, C = selected[rank : rank + states], selected[rank + states :]
        h = torch.exp(step[:, None] * A) * h + step[:, None] * B[None] * main[:, None]
        y = (h * C[None]).sum(1) + p["D"] * main
        y = y * gate * torch.sigmoid(gate)
        outputs.append(p["out_proj.weight"] @ y + p.get("out_proj.bias", 0))
    return torch.stack(outputs)


def paper_batch(module, u, dtype=torch.float64):
    parameters = {name: p.to(dtype) for name, p in module.named_parameters()}
    return torch.stack([paper(parameters, row) for row in u.to(dtype)])


def build(dtype=torch.float64, seed=0, **options):
    """A block whose parameters are all off their initial values, every one with its own scale."""
    torch.manual_seed(seed)
    module = Mamba(**{"d_model": 10, "d_state": 4, "layer_idx": 0, **options}).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.rand(()) * torch.randn_like(p)
    return module


def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, expected):
    """Relative L2 error; an all-zero `got` has error 1."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def cache(offset=0):
    return types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=offset, batch_size_offset=0)


def feed(module, u, cuts, params=None, **options):
    """Run u through the cache in pieces that end at `cuts`; one-token pieces take the decoding step."""
    params = params or cache()
    outputs, begin = [], 0
    with torch.no_grad():
        for end in cuts:
            outputs.append(module(u[:, begin:end], params, **(options if begin == 0 else {})))
            params.seqlen_offset += end - begin
            begin = end
    return torch.cat(outputs, 1), params


@pytest.mark.parametrize("options", [
    {}, {"use_fast_path": False}, {"bias": True}, {"conv_bias": False}, {"d_conv": 2, "expand": 3}, {"dt_rank": 3},
    {"d_state": 1, "d_conv": 8},
], ids=str)  # fmt: skip
def test_output_and_gradients_match_the_paper(options):
    module, u = build(**options), tokens(2, 6, 10).requires_grad_()
    inputs = [u, *module.parameters()]
    out, expected = module(u), paper_batch(module, u)
    assert error(out, expected) < 1e-12
    weight = tokens(*out.shape, seed=2)
    grads, expected_grads = (torch.autograd.grad((o * weight).sum(), inputs) for o in (out, expected))
    for (name, _), got, exact in zip([("u", u), *module.named_parameters()], grads, expected_grads, strict=True):
        assert error(got, exact) < 1e-10, name


def test_a_changed_equation_is_noticed():
    """The comparison above must fail when a term is dropped."""
    module, u = build(), tokens(2, 6, 10)
    for dropped in ("D", "conv1d.bias", "dt_proj.bias"):
        parameters = {n: torch.zeros_like(p) if n == dropped else p for n, p in module.named_parameters()}
        changed = torch.stack([paper(parameters, row) for row in u])
        assert error(module(u), changed) > 1e-4, dropped


@pytest.mark.parametrize("fast", [True, False])
def test_float32(fast):
    module, u = build(torch.float32, use_fast_path=fast), tokens(2, 20, 10, dtype=torch.float32)
    assert error(module(u), paper_batch(module, u)) < 1e-5


@pytest.mark.parametrize("fast", [True, False])
def test_autocast(fast):
    module, u = build(torch.float32, use_fast_path=fast), tokens(2, 20, 10, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(u)
    assert out.dtype == torch.bfloat16
    # Four products and two ops in a row, each rounding to 8 bits: 2^-9 a rounding, amplified by the gate and the scan.
    assert error(out, paper_batch(module, u)) < 3e-2
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


STATE_DICT = {  # of mamba_ssm.modules.mamba_simple.Mamba(d_model=24, d_state=16, bias=True); D = 48, R = 2
    "A_log": (48, 16),
    "D": (48,),
    "in_proj.weight": (96, 24),
    "in_proj.bias": (96,),
    "conv1d.weight": (48, 1, 4),
    "conv1d.bias": (48,),
    "x_proj.weight": (34, 48),
    "dt_proj.weight": (48, 2),
    "dt_proj.bias": (48,),
    "out_proj.weight": (24, 48),
    "out_proj.bias": (24,),
}


def test_state_dict_is_upstreams():
    module = Mamba(24, bias=True)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == STATE_DICT
    without = set(Mamba(24, conv_bias=False).state_dict())
    assert without == set(STATE_DICT) - {"in_proj.bias", "out_proj.bias", "conv1d.bias"}


def test_initialization_is_upstreams():
    torch.manual_seed(0)
    module = Mamba(64, d_state=5, dt_min=0.01, dt_max=0.05, dt_scale=2.0, dtype=torch.bfloat16)
    assert torch.allclose(module.A_log.exp(), torch.arange(1.0, 6.0).expand(128, 5))
    assert torch.equal(module.D, torch.ones(128))
    assert module.A_log.dtype == module.D.dtype == torch.float32  # kept in float32 whatever the dtype
    assert module.in_proj.weight.dtype == torch.bfloat16
    assert module.A_log._no_weight_decay and module.D._no_weight_decay and module.dt_proj.bias._no_reinit
    module = Mamba(64, d_state=5, dt_min=0.01, dt_max=0.05, dt_scale=2.0)
    steps = F.softplus(module.dt_proj.bias)
    assert steps.min() > 0.0099 and steps.max() < 0.0501 and steps.std() > 0.005
    bound = 2.0 * module.dt_rank**-0.5
    assert 0.9 * bound < module.dt_proj.weight.abs().max() <= bound
    assert torch.equal(Mamba(64, dt_init="constant").dt_proj.weight, torch.full((128, 4), 0.5))
    assert F.softplus(Mamba(8, dt_min=1e-7, dt_max=1e-6, dt_init_floor=1e-3).dt_proj.bias).min() > 0.99e-3
    with pytest.raises(ValueError, match="dt_init must be one of 'random', 'constant', got 'zeros'"):
        Mamba(8, dt_init="zeros")


@pytest.mark.parametrize("cuts", [(11,), (4, 11), (1, 2, 3, 11), (2, 3, 7, 8, 9, 10, 11), tuple(range(1, 12))], ids=str)
def test_prefill_chunks_and_steps_agree(cuts):
    module, u = build(), tokens(3, 11, 10)
    out, params = feed(module, u, cuts)
    assert error(out, paper_batch(module, u)) < 1e-12
    _, whole = feed(module, u, (11,))
    for got, expected in zip(params.key_value_memory_dict[0], whole.key_value_memory_dict[0], strict=True):
        # The oldest column of the convolution's state is read by no later token.
        columns = slice(1, None) if got.shape[-1] == module.d_conv else slice(None)
        assert error(got[..., columns], expected[..., columns]) < 1e-12


def test_step_interface():
    module, u = build(), tokens(2, 5, 10)
    conv_state, ssm_state = module.allocate_inference_cache(2, max_seqlen=5)
    assert conv_state.shape == (2, 20, 4) and ssm_state.shape == (2, 20, 4)
    pointers = conv_state.data_ptr(), ssm_state.data_ptr()
    with torch.no_grad():
        outputs = []
        for t in range(5):
            out, conv_state, ssm_state = module.step(u[:, t : t + 1], conv_state, ssm_state)
            outputs.append(out)
    assert (conv_state.data_ptr(), ssm_state.data_ptr()) == pointers
    assert error(torch.cat(outputs, 1), paper_batch(module, u)) < 1e-12
    assert error(conv_state, (u @ module.in_proj.weight.T)[:, 1:, :20].transpose(1, 2)) < 1e-14
    assert module.allocate_inference_cache(1, 8, dtype=torch.bfloat16)[1].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(\*, 1, 10\)"):
        module.step(u, conv_state, ssm_state)


@pytest.mark.parametrize("how", ["forward", "hook", "class"])
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_a_changed_projection_is_called(name, how):
    """Somebody's forward, hook or subclass: the fused paths read the weights alone, and would skip it."""
    layer, seen = Mamba(8, device="cpu").eval(), []
    x = torch.randn(1, 3, 8)
    projection = getattr(layer, name)
    if how == "forward":
        projection.forward = lambda x: seen.append(name) or F.linear(x, projection.weight, projection.bias)
    elif how == "hook":
        projection.register_forward_hook(lambda *_: seen.append(name))
    else:
        projection.__class__ = type("Own", (torch.nn.Linear,), {
            "forward": lambda self, x: seen.append(name) or F.linear(x, self.weight, self.bias)
        })  # fmt: skip
    with torch.no_grad():
        layer(x)
        assert seen == [name]
        layer.step(x[:, :1], *layer.allocate_inference_cache(1, 1))
    assert seen == [name] * 2


class Adapted(torch.nn.Module):
    """A linear layer and a low-rank update beside it, as adapters hang them into a model."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_adapters_and_hooks_on_a_projection_count(name):
    module, u = build(), tokens(2, 5, 10)
    merged, seen = copy.deepcopy(module), []
    setattr(module, name, layer := Adapted(getattr(module, name)))
    with torch.no_grad():
        getattr(merged, name).weight += layer.up @ layer.down
    expected = paper_batch(merged, u)
    out = module(u)
    assert error(out, expected) < 1e-12
    out.sum().backward()
    assert layer.down.grad.any() and layer.up.grad.any()
    states = module.allocate_inference_cache(2, 5)
    with torch.no_grad():
        assert error(torch.cat([module.step(u[:, t : t + 1], *states)[0] for t in range(5)], 1), expected) < 1e-12
    getattr(merged, name).register_forward_hook(lambda *call: seen.append(1))
    assert error(merged(u), expected) < 1e-12 and seen


def test_rows_of_a_shared_cache():
    """batch_size_offset: two halves of a batch that are fed one after the other."""
    module, u = build(), tokens(4, 6, 10)
    params = cache()
    params.key_value_memory_dict[0] = module.allocate_inference_cache(4, 6)
    outputs = []
    for offset in (0, 2):
        params.seqlen_offset, params.batch_size_offset = 0, offset
        outputs.append(feed(module, u[offset : offset + 2], (4, 5, 6), params)[0])
    assert error(torch.cat(outputs), paper_batch(module, u)) < 1e-12


def test_a_new_sequence_forgets_the_old_one():
    module, u = build(), tokens(2, 6, 10)
    params = feed(module, tokens(2, 6, 10, seed=9), (6,))[1]
    params.seqlen_offset = 0
    assert error(feed(module, u, (2, 6), params)[0], paper_batch(module, u)) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_left_padding(bias):
    """A padded row gives what it gives alone, states included, and goes on from them; padding gets no gradient."""
    module = build(bias=bias)
    rows = [tokens(1, length, 10, seed=length) for length in (7, 4, 1)]
    padded = torch.cat([F.pad(row, (0, 0, 7 - row.shape[1], 0), value=3.0) for row in rows]).requires_grad_()
    mask = torch.stack([torch.arange(7) >= 7 - row.shape[1] for row in rows])
    nexts = tokens(3, 2, 10, seed=5)
    out = module(padded, mask=mask)
    for i, row in enumerate(rows):
        assert error(out[i, mask[i]], paper_batch(module, row)[0]) < 1e-12
    real = (out * mask[..., None]).sum()
    (grad,) = torch.autograd.grad(real, padded)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any(-1).all()
    out = feed(module, torch.cat([padded.detach(), nexts], 1), (7, 8, 9), mask=mask.long())[0]
    for i, row in enumerate(rows):
        alone = paper_batch(module, torch.cat([row, nexts[i : i + 1]], 1))[0]
        assert error(out[i, 7 - row.shape[1] :], alone) < 1e-12


def test_packed_sequences():
    module = build()
    lengths = (5, 1, 0, 7)
    rows = [tokens(1, length, 10, seed=length) for length in lengths]
    bounds = torch.tensor([0, 5, 6, 6, 13])
    packed = torch.cat(rows, 1).requires_grad_()
    out, (conv_state, ssm_state) = module(packed, cu_seqlens=bounds, return_final_states=True)
    expected = torch.cat([paper_batch(module, row) for row in rows if row.shape[1]], 1)
    assert error(out, expected) < 1e-12
    for s, row in enumerate(rows):
        alone = module(row, return_final_states=True)[1] if row.shape[1] else module.allocate_inference_cache(1, 0)
        assert torch.allclose(conv_state[s], alone[0][0], rtol=1e-12, atol=0)
        assert torch.allclose(ssm_state[s], alone[1][0], rtol=1e-10, atol=1e-14)
    # The sequences go on from their own states, in a packed batch again, and gradients flow through those.
    more = tokens(1, 8, 10, seed=8)
    out = module(more, cu_seqlens=torch.arange(0, 10, 2), initial_states=(conv_state, ssm_state))
    full = torch.cat(
        [torch.cat([row, more[:, 2 * s : 2 * s + 2]], 1) for s, row in enumerate(rows)], 1
    ).requires_grad_()
    ends = torch.tensor([[7], [10], [12], [21]]) - torch.tensor([2, 1])
    together = module(full, cu_seqlens=torch.tensor([0, 7, 10, 12, 21]))[:, ends.flatten()]
    assert error(out, together) < 1e-12
    weight = tokens(*out.shape, seed=3)
    (got,) = torch.autograd.grad((out * weight).sum(), packed)
    (grad,) = torch.autograd.grad((together * weight).sum(), full)
    keep = torch.ones(21, dtype=torch.bool)
    keep[ends.flatten()] = False
    assert error(got, grad[:, keep]) < 1e-10


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_explicit_states_are_differentiable(cut):
    module, u = build(), tokens(2, 7, 10).requires_grad_()
    first, states = module(u[:, :cut], return_final_states=True)
    second, last = module(u[:, cut:], initial_states=states, return_final_states=True)
    out, whole = torch.cat([first, second], 1), module(u, return_final_states=True)
    assert error(out, whole[0]) < 1e-12
    assert error(last[0], whole[1][0]) < 1e-12 and error(last[1], whole[1][1]) < 1e-12
    loss = [(o**2).sum() + (s[1] ** 3).sum() + s[0].sum() for o, s in ((out, last), whole)]
    for got, expected in zip(*(torch.autograd.grad(value, [u, *module.parameters()]) for value in loss), strict=True):
        assert error(got, expected) < 1e-10


def test_explicit_states_are_not_changed():
    module, u = build(), tokens(2, 3, 10)
    _, states = module(u, return_final_states=True)
    copies = [s.clone() for s in states]
    with torch.no_grad():
        module(u, initial_states=states)
    assert all(torch.equal(s, c) for s, c in zip(states, copies))


def test_low_precision_cache():
    """A bf16 model decodes from its own cache about as well as it prefills."""
    module = build(torch.float32)
    u = tokens(2, 9, 10, dtype=torch.float32)
    expected = paper_batch(module, u)
    module, u = module.to(torch.bfloat16), u.bfloat16()
    prefill, steps = feed(module, u, (9,))[0], feed(module, u, tuple(range(1, 10)))[0]
    # The state is kept in bf16 between steps, as upstream's default cache is: one more rounding a token.
    assert error(prefill, expected) < 3e-2 and error(steps, expected) < 4e-2


def test_compile_fullgraph():
    module = build(torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    u = tokens(2, 6, 10, dtype=torch.float32).requires_grad_()
    out, expected = compiled(u), module(u)
    assert error(out, expected) < 1e-6
    got, exact = (torch.autograd.grad((o**2).sum(), u)[0] for o in (out, expected))
    assert error(got, exact) < 1e-5
    mask = torch.arange(6).expand(2, 6) >= torch.tensor([[2], [0]])
    assert error(compiled(u, mask=mask), module(u, mask=mask)) < 1e-6


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen", "export"])
def test_compile_for_inference(how):
    """The choice of a library for float32 products, made where nothing is differentiated, is not traced."""
    module, u = build(torch.float32).requires_grad_(how != "frozen"), tokens(2, 6, 10, dtype=torch.float32)
    torch._dynamo.reset()
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, contextlib.nullcontext)():
        if how == "export":
            out = torch.export.export(module, (u,), strict=True).module()(u)
        else:
            out = torch.compile(module, fullgraph=True, backend="aot_eager")(u)
        assert error(out, module(u)) < 1e-6


def test_an_exported_block_takes_any_length():
    """Of more tokens than lie between two checkpoints of the scan, too; and it can be differentiated."""
    module, u = build(), tokens(2, 131, 10).requires_grad_()
    shapes = ({1: torch.export.Dim("L", min=2, max=1024)},)
    exported = torch.export.export(module, (tokens(2, 19, 10),), dynamic_shapes=shapes).module()
    outs = exported(u), module(u)
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.square().sum(), u)[0] for out in outs]
    assert error(*grads) < 1e-12


def test_wrong_use_is_named():
    module, u = build(), tokens(2, 3, 10)
    states = module.allocate_inference_cache(2, 3)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(\*, \*, 10\), got \(2, 3, 9\)"):
        module(u[..., :9])
    with pytest.raises(ValueError, match=r"nn.Mamba: mask must have shape \(2, 3\), got \(2, 4\)"):
        module(u, mask=torch.ones(2, 4))
    with pytest.raises(TypeError, match="nn.Mamba: mask must be a torch.Tensor, got list"):
        module(u, mask=[[1, 1, 1]] * 2)
    with pytest.raises(TypeError, match="nn.Mamba: initial_states must be a pair .*, got tuple"):
        module(u, initial_states=states[:1])
    for options, message in ((dict(d_conv=9), "d_conv must be one of 2, .*got 9"), (dict(dt_rank=0), "dt_rank must")):
        with pytest.raises(ValueError, match=f"nn.Mamba: {message}"):
            build(**options)
    with pytest.raises(ValueError, match="mask goes with neither"):
        module(u, mask=torch.ones(2, 3), initial_states=states)
    with pytest.raises(ValueError, match="inference_params holds the states"):
        module(u, cache(), return_final_states=True)
    with pytest.raises(ValueError, match="mask pads the beginning"):
        module(u, cache(offset=3), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="need a layer_idx"):
        build(layer_idx=None)(u, cache())
    with pytest.raises(NotImplementedError, match="has no gradient"):
        module.step(u[:, :1].requires_grad_(), *states)[0].sum().backward()


def test_repeats_bit_for_bit():
    module, u = build(torch.float32), tokens(2, 40, 10, dtype=torch.float32)
    results = []
    for _ in range(2):
        module.zero_grad()
        out = module(u)
        out.sum().backward()
        results.append([out, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
