"""nn.H3 against the paper's recurrences in plain torch, sharing no code with the package."""

import types

import pytest
import torch
import torch.nn.functional as F
from nn_modules import check_against, check_compiled, check_each_matters, check_loads, error, normal, perturbed, tensors

import scalekern
from scalekern.nn import H3, h3

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")


def paper(p, u, head_dim=1):
    """Fu et al. 2023, section 3, token by token: the shift SSM of k, then k v^T through the diagonal SSM, read by q."""
    width, states = p["ssm_k_kernel.kernel.B"].shape
    heads = width // head_dim
    pairs = lambda name: torch.view_as_complex(p[f"kernel.kernel.{name}"])
    copies = [h % len(p["kernel.kernel.A_imag"]) for h in range(heads)]
    A = torch.complex(-p["kernel.kernel.inv_A_real"].exp(), p["kernel.kernel.A_imag"])[copies]
    B, C, dt = pairs("B")[copies], pairs("C")[0], p["kernel.kernel.log_dt"].exp()[:, None]
    a, b = (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
    outs = []
    for row in u:
        shift, x = u.new_zeros(width, states), A.new_zeros(heads, head_dim, head_dim, A.shape[1])
        ys = []
        for token in row:
            q, k, v = (p[f"{n}_proj.weight"] @ token + p[f"{n}_proj.bias"] for n in "qkv")
            shift = torch.cat([torch.zeros_like(shift[:, :1]), shift[:, :-1]], 1)
            shift = shift + p["ssm_k_kernel.kernel.B"] * k[:, None]
            k = (p["ssm_k_kernel.kernel.C"][0] * shift).sum(1) + p["ssm_k_D"] * k
            q, k, v = (t.view(heads, head_dim) for t in (q, k, v))
            kv = k[:, :, None] * v[:, None]  # [H, P, P]
            x = a[:, None, None] * x + b[:, None, None] * kv[..., None]
            y = 2 * (C[:, None, None] * x).sum(-1).real + p["D"][:, None, None] * kv
            ys.append(p["output_linear.weight"] @ (q[:, :, None] * y).sum(1).flatten() + p["output_linear.bias"])
        outs.append(torch.stack(ys))
    return torch.stack(outs)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return perturbed(H3(**{"d_model": 4, "d_state": 6, "layer_idx": 0, "dt_min": 0.05, "dt_max": 0.5, **options}))


def reference(head_dim=1):
    return lambda p, u: paper(p, u, head_dim)


@pytest.mark.parametrize(
    "length, options",
    [(9, {}), (5, {"head_dim": 2, "n_ssm": 1}), (1, {"d_state": 2}), (8, {"measure": "diag-inv", "n_ssm": 2}),
     (7, {"head_dim": 4, "l_max": 7, "measure": "diag-legs"})],
    ids=str,
)  # fmt: skip
def test_output_and_gradients_match_the_paper(length, options):
    check_against(reference(options.get("head_dim", 1)), build(**options), normal(2, length, 4))


def test_a_changed_equation_is_noticed():
    names = ["ssm_k_D", "D", "ssm_k_kernel.kernel.C", "ssm_k_kernel.kernel.B", "kernel.kernel.C", "kernel.kernel.B"]
    names += ["kernel.kernel.A_imag", "q_proj.bias", "k_proj.bias", "v_proj.bias", "output_linear.bias"]
    check_each_matters(reference(2), build(head_dim=2), normal(2, 8, 4), names)


def test_l_max_cuts_both_kernels_off():
    module = build(l_max=3, d_state=8)
    u = normal(1, 9, 4).requires_grad_()
    (grad,) = torch.autograd.grad(module(u)[0, 8].square().sum(), u)
    reached = (grad[0].abs() > 1e-10).any(-1)
    assert reached.tolist() == [t >= 4 for t in range(9)]  # two kernels of three taps each


STATE_DICT = {  # of upstream's H3(d_model=12, d_state=8, head_dim=4, mode="diag", measure="diag-lin")
    "ssm_k_D": (12,),
    "D": (3,),
    "q_proj.weight": (12, 12),
    "q_proj.bias": (12,),
    "k_proj.weight": (12, 12),
    "k_proj.bias": (12,),
    "v_proj.weight": (12, 12),
    "v_proj.bias": (12,),
    "ssm_k_kernel.kernel.B": (12, 8),
    "ssm_k_kernel.kernel.C": (1, 12, 8),
    "kernel.kernel.C": (1, 3, 4, 2),
    "kernel.kernel.log_dt": (3,),
    "kernel.kernel.B": (3, 4, 2),
    "kernel.kernel.inv_A_real": (3, 4),
    "kernel.kernel.A_imag": (3, 4),
    "output_linear.weight": (12, 12),
    "output_linear.bias": (12,),
}


def test_upstreams_checkpoints_load():
    check_loads(H3(12, d_state=8, head_dim=4), STATE_DICT)
    check_loads(H3(12, d_state=8, head_dim=4, lr=0.0), STATE_DICT)  # buffers instead


def test_initialization_is_upstreams():
    torch.manual_seed(0)
    module = H3(64, d_state=8, dt_min=0.01, dt_max=0.05, lr=1e-3, dtype=torch.bfloat16)
    kernel, shift = module.kernel.kernel, module.ssm_k_kernel.kernel
    assert torch.allclose(kernel.inv_A_real.exp(), torch.full((64, 4), 0.5))
    assert torch.allclose(kernel.A_imag, torch.pi * torch.arange(4.0).expand(64, 4))
    assert torch.equal(kernel.B, torch.tensor([1.0, 0.0]).expand(64, 4, 2))
    assert 0.9 < kernel.C.square().sum(-1).mean() < 1.1
    dt = kernel.log_dt.exp()
    assert dt.min() >= 0.01 and dt.max() <= 0.05 and dt.std() > 0.005
    assert torch.equal(shift.B, F.one_hot(torch.zeros(64, dtype=torch.long), 8).float())
    assert 0.9 * 8**-0.5 < shift.C.abs().max() <= 8**-0.5
    assert kernel.A_imag._optim == {"lr": 1e-3, "weight_decay": 0.0} and not hasattr(kernel.C, "_optim")
    assert module.q_proj.weight.dtype == torch.bfloat16 and kernel.C.dtype == shift.C.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"d_model": 5, "d_state": 20}, {"d_state": 8, "l_max": 3}], ids=str)
def test_native_tokens(options, monkeypatch):
    """float32 without gradients: from a prompt's states, which do not change, and through `inference_params`' too."""
    if not h3._here():
        pytest.skip("the CPU library was not built (setup.py says why)")
    module = build(**options)
    u, exact = normal(3, 9, module.d_model), module(normal(3, 9, module.d_model)).detach()
    module, calls, native = module.float(), [], h3._native
    monkeypatch.setattr(h3, "_native", lambda *args: (calls.append(1), native(*args))[1])
    with torch.no_grad():
        _, states = module(u[:, :4].float(), return_final_states=True)
        discretized = module.discretize()
        for t in range(4, 9):
            before = [x.clone() for x in states]
            out, after = module.step(u[:, t : t + 1].float(), states, discretized)
            assert all(map(torch.equal, states, before))
            if "l_max" not in options:  # which cuts no recurrence off
                assert error(out.double(), exact[:, t : t + 1]) < 1e-5
            with scalekern.backend("reference"):
                expected, others = module.step(u[:, t : t + 1].float(), states, discretized)
            assert error(out, expected) < 1e-6 and all(error(x.abs(), y.abs()) < 1e-6 for x, y in zip(after, others))
            states = after
        assert len(calls) == 5
        with pytest.raises(ValueError, match="initial_state"):
            module.step(u[:, :1].float(), (states[0], states[1][..., :-1]), discretized)
        module.half().step(u[:, :1].half(), states, discretized)
    module.float().step(u[:, :1].float(), states, discretized)[0].sum().backward()
    assert len(calls) == 5 and module.D.grad.abs().sum() > 0


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("cuts", [(9,), tuple(range(1, 10)), (4, 4, 5, 7, 9)], ids=str)
def test_chunks_and_steps_equal_one_call(head_dim, cuts):
    module, u = build(head_dim=head_dim), normal(2, 9, 4).requires_grad_()
    states, outs, begin = module.allocate_inference_cache(2), [], 0
    assert states[0].shape == (2, 4, 5) and states[1].shape == (2 * head_dim**2, 4 // head_dim, 3)
    for end in cuts:
        out, states = module(u[:, begin:end], initial_states=states, return_final_states=True)
        outs.append(out)
        begin = end
    out, expected = torch.cat(outs, 1), paper(tensors(module), u, head_dim)
    assert error(out, expected) < 1e-12
    whole, last = module(u, return_final_states=True)
    assert error(states[0], last[0]) < 1e-12 and error(states[1].abs(), last[1].abs()) < 1e-12
    losses = [o.square().sum() + s[1].abs().square().sum() for o, s in ((out, states), (whole, last))]
    grads = (torch.autograd.grad(loss, [u, *module.parameters()]) for loss in losses)
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-10


@pytest.mark.parametrize("name", ["sequence_len_offset", "seqlen_offset"])
def test_inference_params(name):
    module, u = build(head_dim=2), normal(2, 9, 4)
    params, outs = types.SimpleNamespace(key_value_memory_dict={}), []
    module(normal(2, 3, 4, seed=7), types.SimpleNamespace(key_value_memory_dict=params.key_value_memory_dict,
                                                          **{name: 0}))  # fmt: skip
    pointers = [s.data_ptr() for s in params.key_value_memory_dict[0]]
    with torch.no_grad():
        for begin, end in ((0, 4), (4, 5), (5, 8), (8, 9)):  # a new sequence forgets the one before
            setattr(params, name, begin)
            outs.append(module(u[:, begin:end], params))
    assert error(torch.cat(outs, 1), paper(tensors(module), u, 2)) < 1e-12
    assert [s.data_ptr() for s in params.key_value_memory_dict[0]] == pointers


def test_padded_rows_equal_rows_alone():
    module = build(head_dim=2)
    rows = [normal(1, length, 4, seed=length) for length in (9, 4, 1)]
    u = torch.cat([F.pad(row, (0, 0, 9 - row.shape[1], 0), value=3.0) for row in rows]).requires_grad_()
    mask = torch.stack([torch.arange(9) >= 9 - row.shape[1] for row in rows])
    out, states = module(u, mask=mask, return_final_states=True)
    assert error(out, module(u, mask=mask.long())) < 1e-12
    nexts = normal(3, 1, 4, seed=5)
    after, _ = module.step(nexts, states)
    assert error(module.step(nexts, states, module.discretize())[0], after) < 1e-12
    for i, row in enumerate(rows):
        alone = paper(tensors(module), torch.cat([row, nexts[i : i + 1]], 1), 2)[0]
        assert error(torch.cat([out[i, mask[i]], after[i]]), alone) < 1e-12
    (grad,) = torch.autograd.grad((out * mask[..., None]).sum(), u)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any(-1).all()


def test_low_precision():
    """Four products and three gates, each rounding to 8 bits; decoding rounds as often."""
    module, u = build(), normal(2, 12, 4)
    expected = paper(tensors(module), u)
    module = module.float()
    assert error(module(u.float()), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(module(u.float()), expected) < 3e-2
        assert error(module(u.float(), return_final_states=True)[0], expected) < 3e-2
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.output_linear):
        linear.bfloat16()
    assert error(module(u.bfloat16()), expected) < 3e-2


@pytest.mark.parametrize("backend, head_dim", [("eager", 2), ("aot_eager", 1)])
def test_compile_fullgraph(backend, head_dim):
    check_compiled(build(head_dim=head_dim), normal(2, 7, 4), backend)


def test_empty_batch_and_wrong_use():
    module = build()
    assert module(normal(0, 7, 4)).shape == (0, 7, 4)
    with pytest.raises(ValueError, match=r"u must have shape \(\*, \*, 4\), got \(1, 3, 5\)"):
        module(normal(1, 3, 5))
    with pytest.raises(ValueError, match="head_dim must divide d_model = 4, got 3"):
        H3(4, head_dim=3)
    with pytest.raises(ValueError, match="n_ssm must divide the number of heads, 4, got 3"):
        H3(4, n_ssm=3)
    with pytest.raises(ValueError, match="nn.H3: d_state must be even and positive, got 5"):
        H3(4, d_state=5)
    with pytest.raises(ValueError, match="measure must be one of"):
        H3(4, measure="legs")
    params = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with pytest.raises(ValueError, match="need a layer_idx"):
        build(layer_idx=None)(normal(1, 3, 4), params)
    with pytest.raises(ValueError, match="inference_params holds the states"):
        module(normal(1, 3, 4), params, return_final_states=True)
    module(normal(1, 3, 4), params)
    params.seqlen_offset = 3
    with pytest.raises(ValueError, match="mask pads the beginning"):
        module(normal(1, 3, 4), params, mask=torch.ones(1, 3))
