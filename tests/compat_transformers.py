"""What the tests of compat.install and accelerate on transformers' models share: models, and what is compared."""

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scalekern import compat

transformers = pytest.importorskip("transformers")
from scalekern.integrations.transformers import accelerate  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*slow reference.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FAMILIES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
}
SHIMS = ("mamba_ssm", "causal_conv1d", "flashfftconv", "fftconv", "fast_hadamard_transform")
pytestmark.append(
    pytest.mark.skipif(
        any(importlib.util.find_spec(p) for p in SHIMS), reason="a package that the shims stand for is installed"
    )
)


@pytest.fixture
def shims():
    compat.install()
    compat.reset_calls()
    yield
    compat.uninstall()


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


def build(family, seed=0, **options):
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    settings = dict(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=3)
    settings |= dict(eos_token_id=None, tie_word_embeddings=False)
    model = model_class(config_class(**{**settings, **options})).eval()
    with torch.no_grad():  # initial weights are so small that the mixers would hardly count
        for p in model.parameters():
            p += 0.4 * torch.randn_like(p)
    return model


def batch(rows=3, length=12):
    """(ids, mask): rows of different lengths, padded on the left."""
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) >= torch.tensor([[0], [4], [length - 1]])[:rows]).long()
    return ids, mask  # no pad tokens in ids: transformers would make a mask of them where none is given


class SeenOps(TorchDispatchMode):
    """The scalekern ops that run inside: evidence that does not come from the code under test."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "scalekern":
            self.names.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def error(got, expected):
    """Relative L2 error; an all-zero `got` has error 1."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def differentiate(model, training, mask, **options):
    """(logits at real tokens, gradient of every parameter)"""
    ids, padding = batch()
    model.train(training)
    model.zero_grad()
    logits = model(ids, attention_mask=padding if mask else None, **options).logits
    logits = logits[padding.bool()] if mask else logits
    (logits.float() ** 2).mean().backward()
    model.eval()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


def cache_of(out):
    """The cache in a model's output, under the first name that the version has for it."""
    name = "cache" if "cache" in out else "cache_params"
    return {name: out[name]}


def greedy(model, mask, **options):
    ids, padding = batch()
    out = model.generate(ids, attention_mask=padding if mask else None, max_new_tokens=8, do_sample=False, **options)
    return out[:, ids.shape[1] :]


def enter(how, model):
    """Both ways to reach scalekern: the shims under everybody, or one instance."""
    return accelerate(model) if how == "accelerate" else Installed()


class Installed:
    def __enter__(self):
        compat.install()
        compat.reset_calls()

    def __exit__(self, *exception):
        compat.uninstall()


HOW = pytest.mark.parametrize("how", ["install", "accelerate"])
FUSED = {"mamba_inner_fwd"}
SEQUENCE = {"causal_conv1d_fwd", "selective_scan_fwd"}
STEP = {"mamba_update"}
SEPARATE_STEP = {"causal_conv1d_update", "selective_state_update"}
