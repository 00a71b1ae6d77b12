"""The fft_conv family, how it is called: what is refused says op, argument, expected and got, in eager and as a fake;
nothing of no size fails."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import scalekern
from scalekern import nn

B, D, L, K, H, N = 2, 3, 16, 5, 3, 4


def ssm():
    A, Bs, C = torch.randn(3, H, N, dtype=torch.complex64)
    return {"A": -A.abs() + 1j * A.imag, "B": Bs, "C": C, "dt": torch.rand(H)}


def arguments(op):
    u, k = torch.randn(B, D, L), torch.randn(D, K)
    model = ssm()
    model_k = {"Lambda": model["A"], "P": model["B"], "B": model["B"], "C": model["C"], "dt": model["dt"], "L": L}
    return {
        "fft_conv_spectrum": {"k": k, "length": L},
        "fft_conv_step": {"u": u[..., 0], "k": k},
        "toeplitz_conv": {"u": u, "k": k},
        "diag_ssm": {"u": u, **model, "D": None},
        "diag_ssm_kernel": {**model, "L": L},
        "dplr_ssm_kernel": model_k,
        "truncate_C": {name: x for name, x in model_k.items() if name != "B"},
        "depthwise_conv2d": {"x": u[None], "w": torch.randn(B, 3, 3)},
        "depthwise_conv_transpose2d": {"x": u[None], "w": torch.randn(B, 3, 3)},
        "dwt2d": {"x": u[None]},
        "merge_dilated_branches": {
            "weights": [torch.randn(D, 5, 5), torch.randn(D, 3, 3)], "dilations": [1, 2], "size": 5,
        },
    }[op]


REFUSED = [  # op, what is changed of its arguments, what follows its name
    ("fft_conv_step", {"k": torch.ones(D + 1, K)}, r"k must have shape \(3, \*\), got \(4, 5\)"),
    ("fft_conv_step", {"state": torch.ones(B, D, K)}, r"state must have shape \(2, 3, 4\), got \(2, 3, 5\)"),
    ("fft_conv_step", {"k": torch.ones(D, K, device="meta")}, "k must be on cpu like u, got meta"),
    ("fft_conv_spectrum", {"length": True}, "length must be an integer of at least 1, got True"),
    ("fft_conv_spectrum", {"k": torch.ones(2, D, K), "k_reverse": torch.ones(4, D, 2)}, "k_reverse must have 2 sam"),
    ("toeplitz_conv", {"groups": 3.0}, "groups must be an integer or None, got 3.0"),
    ("toeplitz_conv", {"u": torch.ones(B, D, L).to_sparse()}, "u must be dense, got layout sparse_coo"),
    ("diag_ssm", {"conjugate_pairs": None}, "conjugate_pairs must be True or False, got None"),
    ("diag_ssm", {"return_last_state": "no"}, "return_last_state must be True or False, got 'no'"),
    ("diag_ssm_kernel", {"conjugate_pairs": 2.5}, "conjugate_pairs must be True or False, got 2.5"),
    ("dplr_ssm_kernel", {"C_is_truncated": [1]}, r"C_is_truncated must be True or False, got \[1\]"),
    ("truncate_C", {"C": torch.ones(H, N)}, "C must have dtype complex64, complex128, got float32"),
    ("truncate_C", {"dt": torch.ones(H + 1)}, r"dt must have shape \(3,\), got \(4,\)"),
    ("truncate_C", {"L": 0}, "L must be an integer of at least 1, got 0"),
    ("depthwise_conv2d", {"padding": True}, "padding must be an integer .*, got True"),
    ("depthwise_conv_transpose2d", {"stride": (1, True)}, r"stride must be an integer .*, got \(1, True\)"),
    ("dwt2d", {"levels": True}, "levels must be an integer of at least 1, got True"),
    ("merge_dilated_branches", {"dilations": [1]}, r"dilations must be one of each weight, at least one, got \[1\]"),
    ("merge_dilated_branches", {"dilations": [1, 0]}, r"dilations\[1\] must be an integer .*, got 0"),
    ("merge_dilated_branches", {"size": None}, "size must be an integer of at least 1 or a pair, got None"),
    ("merge_dilated_branches", {"weights": [torch.ones(D, 5, 5), torch.ones(2, 3, 3)]}, r"weights\[1\] must have sh"),
]  # fmt: skip


@pytest.mark.parametrize("fake", (False, True))
@pytest.mark.parametrize("op, changed, message", REFUSED)
def test_what_is_refused_is_named(op, changed, message, fake):
    arrange, mode = arguments(op) | changed, FakeTensorMode()
    if fake:
        made = lambda t: t if t.is_sparse or t.is_meta else mode.from_tensor(t)
        arrange = tree_map_only(torch.Tensor, made, arrange)
    with mode if fake else torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"^{op}: {message}"):
        getattr(scalekern, op)(**arrange)


@pytest.mark.parametrize("mode", ("causal", "circular", "same", "full"))
@pytest.mark.parametrize("shape", ((0, 2), (2, 0)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_no_rows_by_fft(mode, shape, dtype):
    """MKL refuses to transform none."""
    u = torch.ones(*shape, 7, dtype=dtype, requires_grad=True)
    for k in (torch.ones(shape[1], 3, dtype=dtype, requires_grad=True), torch.ones(*shape, 3, dtype=dtype)):
        out = scalekern.fft_conv(u, k, mode=mode, method="fft")
        out.sum().backward()
        assert out.shape == (*shape, 9 if mode == "full" else 7) and u.grad.shape == u.shape
        assert scalekern.fft_conv(u, scalekern.fft_conv_spectrum(k, 7, mode), mode=mode).shape == out.shape
        assert k.grad is None or not k.grad.any()


@pytest.mark.parametrize("disc", ("zoh", "bilinear", "dss"))
def test_a_kernel_of_no_length_has_a_gradient(disc):
    model = {name: x.requires_grad_() for name, x in ssm().items()}
    kernel = scalekern.diag_ssm_kernel(**model, L=0, disc=disc)
    assert kernel.shape == (H, 0)
    assert not any(g.any() for g in torch.autograd.grad(kernel.sum(), list(model.values())))


@pytest.mark.parametrize("op", ("depthwise_conv2d", "depthwise_conv_transpose2d"))
def test_padding_made_of_a_size_that_is_a_symbol(op):
    class Padded(torch.nn.Module):
        def forward(self, x, w):
            return getattr(scalekern, op)(x, w, padding=(x.shape[2] // 4, 1))

    sample = lambda rows: (torch.randn(1, 2, rows, 9), torch.randn(2, 3, 3))
    dynamic = ({2: torch.export.Dim.DYNAMIC}, {})
    exported = torch.export.export(Padded(), sample(16), dynamic_shapes=dynamic, strict=False).module()
    args = sample(24)
    assert torch.equal(exported(*args), Padded()(*args))


# --- modules ---------------------------------------------------------------------------------------------------------

TOKENS = torch.ones(2, 6, 8)
MODULES = {
    "S4D": lambda **kw: nn.S4D(8, 4, transposed=False, **kw),
    "S4": lambda **kw: nn.S4(8, 4, transposed=False, **kw),
    "DSS": lambda **kw: nn.DSS(8, 4, transposed=False, version="exp", **kw),
    "H3": lambda **kw: nn.H3(8, 4, **kw),
    "HyenaOperator": lambda **kw: nn.HyenaOperator(8, 16, **kw),
    "MonarchMixerSequenceMixing": lambda **kw: nn.MonarchMixerSequenceMixing(8, 16, **kw),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_mask_that_does_not_fit_is_refused(name):
    module = MODULES[name]()
    for mask, message in (
        (torch.ones(1, 6), r"mask must have shape \(2, 6\), got \(1, 6\)"),
        (torch.ones(2, 5), r"mask must have shape \(2, 6\), got \(2, 5\)"),
        ([1], "mask must be a torch.Tensor, got list"),
        (torch.ones(2, 6, dtype=torch.complex64), "mask must have dtype .*, got complex64"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^nn.{name}: {message}"):
            module(TOKENS, mask=mask)


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_no_tokens_and_on_the_meta_device(name):
    out = MODULES[name]()(TOKENS[:, :0])
    assert out.shape == (2, 0, 8)
    assert MODULES[name](device="meta")(TOKENS.to("meta")).shape == TOKENS.shape


@pytest.mark.parametrize("name", ("S4", "S4D", "DSS", "H3", "HyenaOperator"))
def test_a_state_that_does_not_fit_is_refused(name):
    module = MODULES[name]()
    if name in ("H3", "HyenaOperator"):
        given, states = "initial_states", module.allocate_inference_cache(2)
        wrong = [(states[0][:1], states[1]), (states[0][..., :-1], states[1]), states[:1], 3, "ab"]
        wrong += [(states[0], states[1][:1])] if name == "H3" else []
        step = TOKENS[:, :1]
    else:
        given, states = "initial_state", module.default_state(2)
        wrong, step = [states[:1], states[..., :-1], states[0], [1], 3], TOKENS[:, 0]
    for state in wrong:
        for call in (lambda: module(TOKENS, **{given: state}), lambda: module.step(step, state)):
            with pytest.raises((TypeError, ValueError), match="^[^ ]+: .*must .*, got"):
                call()
    for token in ([1.0], None, TOKENS[0, 0]):
        with pytest.raises((TypeError, ValueError), match=f"^nn.{name}: u must .*, got"):
            module.step(token, states)


@pytest.mark.parametrize("call", (
    lambda: nn.S4D(0), lambda: nn.S4(8, channels=0), lambda: nn.S4(8, l_max=0), lambda: nn.S4(8, rank=None),
    lambda: nn.S4(8, init=None), lambda: nn.S4(8, dt_min=0.1, dt_max=0.01), lambda: nn.DSS(-1),
    lambda: nn.DSS(8, max_kernel_length=2.5), lambda: nn.H3("8"), lambda: nn.H3(8, l_max=-1),
    lambda: nn.HyenaOperator(0, 16), lambda: nn.HyenaOperator(8, 16, emb_dim="3"),
    lambda: nn.HyenaOperator(8, 16, short_filter_order=None), lambda: nn.MonarchMixerBlock(8, None, 16),
    lambda: nn.ssm_init.hippo("legs", 2.5), lambda: nn.ssm_init.low_rank("legt", -1),
    lambda: nn.ssm_init.nplr("legs", "4"), lambda: nn.ssm_init.s4d("lin", None),
))  # fmt: skip
def test_sizes_that_are_none_are_named(call):
    with pytest.raises((TypeError, ValueError), match="^[^ ]+: .*must .*, got"):
        call()


def test_a_frequency_of_many_names_is_one_parameter():
    """Through functional_call, which put a tensor in place of it for good, and a move from the meta device."""
    filter_ = nn.HyenaFilter(4, bidirectional=True)
    names = [name for name, _ in filter_.named_parameters(remove_duplicate=False) if name.endswith("freq")]
    values = {name: p.detach().clone() for name, p in filter_.named_parameters()}
    torch.func.functional_call(filter_, values, (torch.ones(1, 4, 3),))
    moved = nn.HyenaFilter(4, bidirectional=True, device="meta").to_empty(device="cpu")
    for module in (filter_, moved):
        found = [module.get_parameter(name) for name in names]
        assert len(names) == 6 and all(p is found[0] for p in found)
