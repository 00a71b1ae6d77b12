"""nn.S4D, nn.S4 and nn.DSS against recurrences and sums in plain torch, sharing no code with the package."""

import pytest
import torch
import torch.nn.functional as F
from nn_modules import check_against, check_compiled, check_each_matters, check_loads, error, normal, perturbed, tensors

from scalekern.nn import DSS, S4, S4D

pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference.*")
H = 4


def sub(p, prefix):
    return {name.removeprefix(f"{prefix}."): t for name, t in p.items() if name.startswith(f"{prefix}.")}


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def both(x):
    """Halves of conjugate pairs to all."""
    return torch.cat([x, x.conj()], -1)


def powers(a, b, c, length):
    """c a^l b for every l: K of one discrete model, a (N, N)."""
    taps, x = [], b
    for _ in range(length):
        taps.append((c * x).sum().real)
        x = a @ x
    return torch.stack(taps)


def zoh(A, dt, B):
    return torch.diag(torch.exp(dt * A)), B * (torch.exp(dt * A) - 1) / A


def bilinear(A, dt, B):
    eye = torch.eye(len(A), dtype=A.dtype)
    inverse = torch.linalg.inv(eye - dt / 2 * A)
    return inverse @ (eye + dt / 2 * A), dt * (inverse @ B)


def s4d_kernel(p, length):
    """Gu et al. 2022 (S4D), section 3.2, with B = 1 under the zero-order hold: (1, H, L)."""
    C = torch.view_as_complex(p["C"])
    A = torch.complex(-p["log_A_real"].exp(), p["A_imag"])
    rows = [powers(*zoh(both(A[h]), p["log_dt"][h].exp(), 1), both(C[h]), length) for h in range(len(C))]
    return torch.stack(rows)[None]


def s4_kernel(p, length, disc="bilinear"):
    """Gu et al. 2022 (S4), section 2.3 by its definition, for A = diag(A) - P P^H: (C, H, L)."""
    B, C = torch.view_as_complex(p["B"])[0], torch.view_as_complex(p["C"])
    A = -torch.complex(p["A_real"].exp(), p["A_imag"])
    P = torch.view_as_complex(p["P"]) if "P" in p else None
    rows = []
    for h in range(C.shape[1]):
        copy, dt = h % len(A), p["inv_dt"][h, 0].exp()
        if disc == "zoh":
            a, b = zoh(both(A[copy]), dt, both(B[copy]))
        else:
            dense = torch.diag(both(A[copy]))
            for low in P[:, copy] if P is not None else ():
                dense = dense - torch.outer(both(low), both(low).conj())
            a, b = bilinear(dense, dt, both(B[copy]))
        for c in C[:, h]:
            c = both(c)
            if int(p.get("l_kernel", 0)):
                c = torch.linalg.inv(torch.eye(len(c)) - torch.linalg.matrix_power(a, int(p["l_kernel"]))).T @ c
            rows.append(powers(a, b, c, length))
    return torch.stack(rows).unflatten(0, (C.shape[1], len(C))).transpose(0, 1)


def dss_kernel(p, length):
    """Gupta et al. 2022, proposition 1: a softmax over the length, or the zero-order hold: (C, H, L).

    The sum of a row is geometric; its reciprocal has the epsilon of DSS's released code. A row that grows is taken from
    its end.
    """
    W = torch.view_as_complex(p["W"])
    exp = "Lambda_im" in p
    Lambda = torch.complex(-p["Lambda_log_neg_re"].exp(), p["Lambda_im"]) if exp else torch.view_as_complex(p["Lambda"])
    dt = p["log_dt"].exp()
    dt = torch.stack([dt, dt], 1) if dt.dim() == 1 else dt
    z = torch.complex(dt[:, :1] * Lambda.real, dt[:, 1:] * Lambda.imag)  # [H, N]
    growing = (Lambda.real > 0) & (not exp)
    rows = torch.exp(z[..., None] * (torch.arange(length) - (length - 1) * growing[:, None]))
    z = torch.where(growing, -z, z)
    if exp:
        return torch.einsum("chn,hn,hnl->chl", W, (torch.exp(z) - 1) / Lambda, rows).real
    x = (torch.exp(length * z) - 1) * Lambda
    return torch.einsum("chn,hn,hnl->chl", W, (torch.exp(z) - 1) * x.conj() / (x.abs().square() + 1e-7), rows).real


def convolve(k, D, u, k_reverse=None):
    """(B, H, L) with K (C, H, L) to (B, C H, L): tap s looks s back, a reverse tap s + 1 ahead."""
    length, outs = u.shape[-1], []
    for t in range(length):
        y = D * u[:, None, :, t]
        for s in range(length):
            if s <= t:
                y = y + k[..., t - s] * u[:, None, :, s]
            elif k_reverse is not None:
                y = y + k_reverse[..., s - t - 1] * u[:, None, :, s]
        outs.append(y.flatten(1))
    return torch.stack(outs, -1)


def glu(weight, bias, y):
    value, gate = (torch.einsum("oc,bcl->bol", weight, y) + bias[:, None]).chunk(2, 1)
    return value / (1 + torch.exp(-gate))


def s4d(p, u):
    y = convolve(s4d_kernel(sub(p, "kernel"), u.shape[-1]), p["D"], u)
    return glu(p["output_linear.0.weight"][..., 0], p["output_linear.0.bias"], gelu(y))


def s4(p, u, disc="bilinear", bidirectional=False, taps=None):
    k = s4_kernel(sub(p, "layer.kernel"), u.shape[-1] if taps is None else taps, disc)
    k, k_reverse = k.chunk(2) if bidirectional else (k, None)
    k = F.pad(k, (0, u.shape[-1] - k.shape[-1]))
    y = convolve(k, p["layer.D"], u, k_reverse)
    return glu(p["output_linear.0.weight"], p["output_linear.0.bias"], gelu(y))


def dss(p, u, bidirectional=False):
    k = dss_kernel(sub(p, "kernel"), u.shape[-1])
    y = gelu(convolve(*(k.chunk(2)[:1] if bidirectional else [k]), p["D"], u, k.chunk(2)[1] if bidirectional else None))
    return torch.einsum("oc,bcl->bol", p["output_linear.weight"], y) + p["output_linear.bias"].view(-1, 1)


STEPS = {"dt_min": 0.05, "dt_max": 0.5}


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    module = kind(H, **{"d_state": 6, **STEPS, **options})
    length = options.get("l_max") if kind is S4 else None
    # A truncated C that is moved stands for another C: all the same a parameter.
    return perturbed(module, scale=0.1 if length else 0.3)


CASES = {
    "s4d": (S4D, {}, s4d, 9),
    "s4d_one": (S4D, {"d_state": 2}, s4d, 1),
    "s4": (S4, {}, s4, 9),
    "s4_truncated": (S4, {"l_max": 9, "init": "legt", "rank": 2, "n_ssm": 2, "channels": 2}, s4, 9),
    "s4_fout": (S4, {"init": "fout", "rank": 2, "bidirectional": True}, lambda p, u: s4(p, u, bidirectional=True), 7),
    "s4_diag": (S4, {"mode": "diag", "init": "diag-inv", "n_ssm": 1}, lambda p, u: s4(p, u, "zoh"), 8),
    "s4_diag_bilinear": (S4, {"mode": "diag", "init": "diag-legs", "disc": "bilinear", "channels": 3}, s4, 5),
    "dss": (DSS, {}, dss, 9),
    "dss_wide": (DSS, {"channels": 2, "bidirectional": True, "sep_dt_re_im": False}, lambda p, u: dss(p, u, True), 6),
    "dss_exp": (DSS, {"version": "exp", "channels": 2}, dss, 7),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_the_equations(name):
    kind, options, rendering, length = CASES[name]
    # Roots of unity near a pole cost the gradients of S4's kernel digits.
    check_against(rendering, build(kind, **options), normal(2, H, length), gradient_error=1e-9)


def test_a_changed_equation_is_noticed():
    u = normal(2, H, 8)
    kernel = ("C", "B", "A_imag", "P")
    check_each_matters(s4, build(S4), u, ["layer.D", "output_linear.0.bias", *(f"layer.kernel.{n}" for n in kernel)])
    check_each_matters(s4d, build(S4D), u, ["D", "kernel.C", "kernel.A_imag", "output_linear.0.bias"])
    check_each_matters(dss, build(DSS), u, ["D", "kernel.W", "output_linear.bias"])


def test_a_truncated_C_serves_other_lengths():
    """Shorter sequences cut the kernel, longer ones double its length, without an l_max to cut them off."""
    module = build(S4, l_max=4)
    for length in (3, 11):
        k = module.layer.kernel(length)
        expected = s4_kernel(sub(tensors(module), "layer.kernel"), length)
        assert error(k, expected) < 1e-10
    assert error(module(normal(1, H, 7)), s4(tensors(module), normal(1, H, 7), taps=4)) < 1e-10


def test_l_max_is_where_the_kernel_ends():
    fresh = S4(H, d_state=6, l_max=9, **STEPS)
    assert int(fresh.layer.kernel.l_kernel) == 9 and int(S4(H).layer.kernel.l_kernel) == 0
    torch.manual_seed(3)
    truncated = S4(H, d_state=6, l_max=9, **STEPS).double()
    torch.manual_seed(3)
    plain = S4(H, d_state=6, **STEPS).double()
    u = normal(2, H, 9)
    assert error(truncated(u), plain(u)) < 1e-5  # C was truncated in float32
    plain.load_state_dict(truncated.state_dict())
    assert error(plain(u), truncated(u)) < 1e-14


S4_KEYS = {
    "layer.D": (1, 6),
    "layer.kernel.inv_dt": (6, 1),
    "layer.kernel.A_real": (2, 4),
    "layer.kernel.A_imag": (2, 4),
    "layer.kernel.B": (1, 2, 4, 2),
    "layer.kernel.C": (1, 6, 4, 2),
    "output_linear.0.weight": (12, 6),
    "output_linear.0.bias": (12,),
}
STATE_DICTS = {
    "S4Block(6, d_state=8, n_ssm=2, rank=2, init='legt')": (
        lambda: S4(6, 8, n_ssm=2, rank=2, init="legt"),
        {**S4_KEYS, "layer.kernel.P": (2, 2, 4, 2), "layer.kernel.l_kernel": ()},
    ),
    "S4Block(6, d_state=8, n_ssm=2, mode='diag', init='diag-lin')": (lambda: S4(6, 8, n_ssm=2, mode="diag"), S4_KEYS),
    "S4D(6, d_state=8)": (
        lambda: S4D(6, 8),
        {"D": (6,), "kernel.C": (6, 4, 2), "kernel.log_dt": (6,), "kernel.log_A_real": (6, 4), "kernel.A_imag": (6, 4),
         "output_linear.0.weight": (12, 6, 1), "output_linear.0.bias": (12,)},
    ),
    "DSS(6, d_state=8, channels=2)": (
        lambda: DSS(6, 8, channels=2),
        {"D": (2, 6), "kernel.log_dt": (6, 2), "kernel.Lambda": (8, 2), "kernel.W": (2, 6, 8, 2),
         "output_linear.weight": (6, 12), "output_linear.bias": (6, 1)},
    ),
    "DSS(6, d_state=8, version='exp', sep_dt_re_im=False, transposed=False)": (
        lambda: DSS(6, 8, version="exp", sep_dt_re_im=False, transposed=False),
        {"D": (1, 6), "kernel.log_dt": (6,), "kernel.Lambda_log_neg_re": (8,), "kernel.Lambda_im": (8,),
         "kernel.W": (1, 6, 8, 2), "output_linear.weight": (6, 6), "output_linear.bias": (6,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("upstream", STATE_DICTS)
def test_upstreams_checkpoints_load(upstream):
    make, shapes = STATE_DICTS[upstream]
    check_loads(make(), shapes)


def test_initialization_is_upstreams():
    torch.manual_seed(0)
    kernel = S4(64, d_state=8, init="legs", dt_min=0.01, dt_max=0.05, lr=1e-3, dtype=torch.bfloat16).layer.kernel
    n = torch.arange(8.0)
    A = -torch.tril(torch.outer(2 * n + 1, 2 * n + 1).sqrt(), -1) - torch.diag(n + 1)  # HiPPO-LegS
    diagonal = torch.diag(both(-torch.complex(kernel.A_real.exp(), kernel.A_imag)[0]))
    P = both(torch.view_as_complex(kernel.P[0, 0]))
    got = torch.linalg.eigvals((diagonal - torch.outer(P, P.conj())).to(torch.complex128))
    assert torch.allclose(got.real.sort()[0], torch.linalg.eigvals(A.double()).real.sort()[0], atol=1e-2)
    assert (kernel.A_imag >= 0).all() and kernel.inv_dt.exp().min() >= 0.01 and kernel.inv_dt.exp().max() <= 0.05
    assert 0.9 < kernel.C.square().sum(-1).mean() < 1.1 and kernel.C.dtype == torch.float32
    assert kernel.P._optim == {"lr": 1e-3, "weight_decay": 0.0} and not hasattr(kernel.C, "_optim")
    minimal = S4D(16, d_state=8).kernel
    assert torch.allclose(minimal.log_A_real.exp(), torch.tensor(0.5))
    assert torch.allclose(minimal.A_imag, torch.pi * torch.arange(4.0))
    Lambda = DSS(4, d_state=8).kernel.Lambda
    skew = torch.tril(torch.outer(2 * torch.arange(16.0) + 1, 2 * torch.arange(16.0) + 1).sqrt(), -1)
    top = torch.linalg.eigvals((skew - skew.T).double() / 2).imag.sort(descending=True)[0][:8]
    assert torch.allclose(Lambda[:, 1].double(), top, rtol=1e-5) and torch.allclose(Lambda[:, 0], torch.tensor(-0.5))


STATEFUL = ["s4d", "s4", "s4_truncated", "s4_diag", "s4_diag_bilinear", "dss_exp"]


@pytest.mark.parametrize("name", STATEFUL)
def test_chunks_and_steps_equal_one_call(name):
    kind, options, rendering, _ = CASES[name]
    module, u = build(kind, **options), normal(2, H, 9).requires_grad_()
    whole, last = module(u, return_last_state=True)
    expected = rendering(tensors(module), u)
    assert error(whole, expected) < 1e-10
    discretized = module.discretize()
    state, outs = module.default_state(2, torch.complex128), []
    assert state.shape == last.shape
    for begin, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        if end == begin + 1:
            out, state = module.step(u[..., begin], state, discretized)
            outs.append(out[..., None])
        else:
            out, state = module(u[..., begin:end], initial_state=state, return_last_state=True)
            outs.append(out)
    assert error(torch.cat(outs, 2), expected) < 1e-10
    assert error(torch.view_as_real(state), torch.view_as_real(last)) < 1e-10
    losses = [o.square().sum() + s.abs().square().sum() for o, s in ((torch.cat(outs, 2), state), (whole, last))]
    grads = (torch.autograd.grad(loss, [u, *module.parameters()]) for loss in losses)
    for got, exact in zip(*grads, strict=True):
        assert error(got, exact) < 1e-7


def test_chunks_of_a_low_rank_model():
    """More tokens than one product of matrices takes, and a last one that is shorter."""
    module, u = build(S4, dt_min=0.01, dt_max=0.05), normal(1, H, 150)
    assert error(module(u, return_last_state=True)[0], module(u)) < 1e-9


def test_layouts_masks_and_taps():
    for kind, options in ((S4D, {}), (S4, {}), (DSS, {})):
        torch.manual_seed(0)
        module = build(kind, transposed=False, **options)
        u = normal(2, 7, H)
        out = module(u)
        assert out.shape == u.shape
        transposed = build(kind, **options)
        state = {n: t.view(transposed.state_dict()[n].shape) for n, t in module.state_dict().items()}
        transposed.load_state_dict(state)
        assert error(out, transposed(u.transpose(1, 2)).transpose(1, 2)) < 1e-13
    module = build(S4, bidirectional=True)
    row = normal(1, H, 4)
    for pads in ((3, 0), (0, 3)):
        mask = F.pad(torch.ones(1, 4), pads)
        out = module(F.pad(row, pads, value=5.0), mask=mask)
        assert error(out[..., mask[0] == 1], module(row)) < 1e-9
    capped = build(DSS, max_kernel_length=3)
    u = normal(1, H, 8).requires_grad_()
    (grad,) = torch.autograd.grad(capped(u)[0, :, 7].square().sum(), u)
    assert (grad[0].abs() > 1e-10).any(0).tolist() == [t > 4 for t in range(8)]


def test_low_precision_dropout_and_empty_batch():
    for kind, rendering in ((S4D, s4d), (S4, s4), (DSS, dss)):
        module, u = build(kind, dropout=0.5).eval(), normal(2, H, 9)
        expected = rendering(tensors(module), u)
        module = module.float()
        assert error(module(u.float()), expected) < 3e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(module(u.float()), expected) < 2e-2
        assert module(torch.zeros(0, H, 9)).shape == (0, H, 9)
        assert error(module.train()(u.float()), module(u.float())) > 1e-2


@pytest.mark.parametrize("kind, backend", [(S4D, "aot_eager"), (S4, "eager"), (DSS, "aot_eager")])
def test_compile_fullgraph(kind, backend):
    check_compiled(build(kind, **({"l_max": 7} if kind is S4 else {})), normal(2, H, 7), backend)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=r"S4D: u must have shape \(\*, 4, \*\), got \(1, 5, 3\)"):
        build(S4D)(normal(1, 5, 3))
    with pytest.raises(ValueError, match="a bidirectional model has no states"):
        build(S4, bidirectional=True)(normal(1, H, 3), return_last_state=True)
    with pytest.raises(ValueError, match="disc 'dss' has no states"):
        build(DSS)(normal(1, H, 3), return_last_state=True)
    with pytest.raises(ValueError, match="mode must be one of 'dplr', 'diag', got 'nplr'"):
        S4(H, mode="nplr")
    with pytest.raises(ValueError, match="'legt' needs a rank of at least 2, got 1"):
        S4(H, init="legt")
    for kind in (S4D, S4):
        with pytest.raises(ValueError, match="d_state must be even and positive, got 3"):
            kind(H, d_state=3)
    with pytest.raises(ValueError, match="n_ssm must divide d_model = 4, got 3"):
        S4(H, n_ssm=3)
    with pytest.raises(ValueError, match="disc must be one of"):
        S4(H, mode="diag", disc="dss")
    with pytest.raises(ValueError, match="version must be one of 'softmax', 'exp', got 'clip'"):
        DSS(H, version="clip")
