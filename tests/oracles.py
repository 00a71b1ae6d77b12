"""What the tests of the fft_conv family's oracles share: inputs, and explicit derivatives against autograd's."""

import importlib
import inspect

import pytest
import torch

from scalekern.testing import assert_close
from scalekern.testing import fft_conv as family

# The modules: the package itself gathers the functions, some of which have the names of their modules.
depthwise_conv2d, diag_ssm, dplr_ssm, dwt2d, fft_conv = (
    importlib.import_module(f"scalekern.reference.{name}")
    for name in ("depthwise_conv2d", "diag_ssm", "dplr_ssm", "dwt2d", "fft_conv")
)

TIGHT = 1e-12  # float64 against float64

# op: (oracle, its differentiable arguments, explicit backward of (output gradients, the bound call))
ORACLES = {
    "fft_conv": (
        fft_conv.fft_conv, "u k k_reverse skip bias pregate postgate",
        lambda g, a: fft_conv.fft_conv_bwd(*g, *_pick(a, "u k k_reverse skip bias pregate postgate mask mode method")),
    ),
    "fft_conv_chunk": (
        fft_conv.fft_conv_chunk, "u_chunk k state",
        lambda g, a: fft_conv.fft_conv_chunk_bwd(*g, *_pick(a, "u_chunk k state")),
    ),
    "fft_conv_step": (
        fft_conv.fft_conv_step, "u k state",
        lambda g, a: _squeezed(
            fft_conv.fft_conv_chunk_bwd(g[0][..., None], g[1], a["u"][..., None], a["k"], a["state"])
        ),
    ),
    "toeplitz_conv": (
        fft_conv.toeplitz_conv, "u k", lambda g, a: fft_conv.toeplitz_conv_bwd(*g, *_pick(a, "u k groups")),
    ),
    "diag_ssm_kernel": (
        diag_ssm.diag_ssm_kernel, "A B C dt",
        lambda g, a: diag_ssm.diag_ssm_kernel_bwd(*g, *_pick(a, "A B C dt disc conjugate_pairs")),
    ),
    "dplr_ssm_kernel": (
        dplr_ssm.dplr_ssm_kernel, "Lambda P B C dt",
        lambda g, a: dplr_ssm.dplr_ssm_kernel_bwd(*g, *_pick(a, "Lambda P B C dt conjugate_pairs")),
    ),
    "diag_ssm": (
        diag_ssm.diag_ssm, "u A B C D dt initial_state",
        lambda g, a: diag_ssm.diag_ssm_bwd(
            g[0], g[1] if len(g) > 1 else None, *_pick(a, "u A B C D dt initial_state disc conjugate_pairs")
        ),
    ),
    "depthwise_conv2d": (
        depthwise_conv2d.depthwise_conv2d, "x w bias",
        lambda g, a: depthwise_conv2d.depthwise_conv2d_bwd(
            *g, a["x"], _filter(a), *_pick(a, "bias padding stride dilation")
        ),
    ),
    "depthwise_conv_transpose2d": (
        depthwise_conv2d.depthwise_conv_transpose2d, "x w bias",
        lambda g, a: depthwise_conv2d.depthwise_conv_transpose2d_bwd(
            *g, a["x"], _filter(a), *_pick(a, "bias stride padding output_padding dilation")
        ),
    ),
    "dwt2d": (dwt2d.dwt2d, "x", lambda g, a: [dwt2d.dwt2d_bwd(g, *_pick(a, "x wavelet mode"))]),
    "idwt2d": (
        dwt2d.idwt2d, "low details",
        lambda g, a: dwt2d.idwt2d_bwd(*g, [a["low"], *a["details"]], *_pick(a, "wavelet mode")),
    ),
}  # fmt: skip

CASES = [(op, sample) for op, spec in family.SPECS.items() for sample in spec.samples]


@pytest.fixture(autouse=True)
def one_thread():
    """For the modules that import it. The tensors are tiny: on a busy machine two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(*ops):
    """Parameters and names of the samples of these ops, for pytest.mark.parametrize("op, sample", *cases(..))."""
    chosen = [(op, sample) for op, sample in CASES if op in ops]
    return dict(argvalues=chosen, ids=[f"{op}-{sample.name}" for op, sample in chosen])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 97 * len(shape)), dtype=dtype)


def bound(op, args, kwargs):
    """{argument: value} of a call, defaults included."""
    call = inspect.signature(ORACLES[op][0]).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def run(op, args, kwargs):
    outputs = ORACLES[op][0](*args, **kwargs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_explicit_backward(op, sample, tolerance=TIGHT):
    """The backward written out against autograd of the oracle, every argument of a sample in float64."""
    args, kwargs = sample.make(dtype=torch.float64)
    arguments = differentiable(op, args, kwargs)
    leaves = [x.requires_grad_() for _, x in arguments if x is not None]
    outputs = run(op, args, kwargs)
    weights = [randn(*o.shape, seed=i, dtype=o.dtype) for i, o in enumerate(outputs)]
    expected = iter(torch.autograd.grad(outputs, leaves, weights))
    with torch.no_grad():
        gradients = ORACLES[op][2](weights, bound(op, args, kwargs))
    assert len(gradients) == len(arguments)
    for (name, x), g in zip(arguments, gradients):
        if x is None:
            assert g.shape == (0,), name
            continue
        e, g = next(expected), g.reshape(x.shape)
        assert g.dtype == x.dtype and (e.norm() > 0 or not e.numel()), name  # zeros would prove nothing
        assert_close(g, e, tolerance=tolerance, what=f"gradient of {name}")


def differentiable(op, args, kwargs):
    """(name, tensor or None) of the differentiable arguments of a call, in the order of its backward's results."""
    values = bound(op, args, kwargs)
    names = ORACLES[op][1].split()
    return [(n, x) for n in names for x in (values[n] if isinstance(values[n], tuple) else (values[n],))]


def _pick(arguments, names):
    return [arguments[name] for name in names.split()]


def _filter(a):
    return a["w"][:, 0] if a["w"].dim() == 4 else a["w"]


def _squeezed(gradients):
    du, *rest = gradients
    return du[..., 0], *rest
