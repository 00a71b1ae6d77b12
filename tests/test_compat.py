"""compat.install and integrations.transformers.accelerate: an unmodified transformers computes the same with them."""

import copy
import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scalekern import compat, nn

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


@HOW
@pytest.mark.parametrize("mask", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_and_gradients(model, how, training, mask):
    expected = differentiate(model, training, mask)
    with enter(how, model), SeenOps() as seen:
        got = differentiate(model, training, mask)
    # fp32 on both sides, in different orders of summation; 2 layers and a norm amplify the roundings.
    assert_same(got, expected, 2e-5)
    fused = training and not mask and type(model).__name__.startswith("Mamba")
    assert seen.names >= (FUSED if fused else SEQUENCE)
    assert fused == bool(seen.names & FUSED)


@HOW
@pytest.mark.parametrize("mask", [False, True], ids=["full", "padded"])
def test_greedy_tokens(model, how, mask):
    expected = greedy(model, mask)
    with enter(how, model), SeenOps() as seen:
        got = greedy(model, mask)
    assert torch.equal(got, expected)
    assert len(set(got.flatten().tolist())) > 5  # not one token over and over
    assert seen.names >= SEQUENCE | STEP


@HOW
@pytest.mark.parametrize("where", ["mixer.x_proj", "mixer", "norm"])
def test_hooked_modules_are_called(model, how, where):
    """A module that is more than its weights (here: has a hook) runs as a module, not inside the fused step."""
    hooked = model.backbone.layers[0].get_submodule(where)
    handle = hooked.register_forward_hook(lambda module, args, out: out.flip(-1))
    expected = greedy(model, False)
    with enter(how, model), SeenOps() as seen:
        got = greedy(model, False)
    handle.remove()
    assert not torch.equal(expected, greedy(model, False))
    assert torch.equal(got, expected)
    assert seen.names >= STEP | (SEPARATE_STEP if where == "mixer.x_proj" else set())  # the other layer is fused


@HOW
def test_cache_contents_and_steps(model, how):
    """Prefill with a cache, then tokens one by one: the states and logits of both ways agree at every step."""
    ids, mask = batch()

    def run():
        with torch.no_grad():
            out = model(ids, attention_mask=mask, use_cache=True)
            seen = [out.logits]
            for token in (3, 7, 11):
                column = torch.full((ids.shape[0], 1), token)
                out = model(column, use_cache=True, **cache_of(out))
                seen.append(out.logits)
            for layer in next(iter(cache_of(out).values())).layers:
                seen += [layer.conv_states[0], layer.recurrent_states[0]]
        return {str(i): t.clone() for i, t in enumerate(seen)}

    expected = run()
    with enter(how, model):
        got = run()
    assert_same(got, expected, 1e-5)


@HOW
def test_cached_generation_equals_uncached(model, how):
    with enter(how, model):
        ids, _ = batch(rows=1)
        with torch.no_grad():
            cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
            uncached = ids
            for _ in range(6):
                uncached = torch.cat([uncached, model(uncached, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_good_as_without(family):
    """Against the same weights in float64, over logits and all gradients: no worse than transformers' own bf16 path.

    The ratio of the two errors is mostly luck for one model (0.4 to 1.8 over 20 seeds, geometric mean 0.86 for Mamba
    and 0.97 for FalconMamba), so the mean over four is held, to 2.7 standard deviations of such a mean.
    """
    ratios = []
    for seed in range(4):
        model = build(family, seed=seed).to(torch.bfloat16)
        exact = differentiate(copy.deepcopy(model).double(), True, True)
        before = differentiate(model, True, True)
        with Installed():
            got = differentiate(model, True, True)
        ratios += [error(got[n], exact[n]) / error(before[n], exact[n]) for n in exact]
        assert error(got["logits"], exact["logits"]) < 0.1
    assert torch.tensor(ratios).log().mean().exp() < 1.5


@HOW
def test_biases_and_gradient_checkpointing(how):
    model = build("mamba", use_bias=True, use_conv_bias=False)
    expected = differentiate(model, True, True)
    # its name in later versions, or in earlier ones
    checkpointing = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{checkpointing}_checkpointing_enable")()
    with enter(how, model):
        got = differentiate(model, True, True)
        assert_same(got, expected, 2e-5)
        got = differentiate(model, True, False)
    getattr(model, f"{checkpointing}_checkpointing_disable")()
    assert_same(got, differentiate(model, True, False), 2e-5)


@HOW
def test_compiles_in_one_graph(how):
    model = build("mamba")
    ids, mask = batch()
    with enter(how, model):
        compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
        for padding in (None, mask):
            options = dict(attention_mask=padding, use_cache=False)
            assert error(compiled(ids, **options).logits, model(ids, **options).logits) < 1e-6
    torch._dynamo.reset()


def test_a_dropped_mask_is_noticed(model):
    """The padded cases above compare something that the mask changes."""
    ids, mask = batch()
    with torch.no_grad():
        with_mask, without = (model(ids, attention_mask=m).logits[mask.bool()] for m in (mask, None))
    assert error(without, with_mask) > 1e-2


def test_counter(shims, model):
    fused = type(model).__name__.startswith("Mamba")
    ids, mask = batch()
    model.train()
    model(ids)
    expected = {"mamba_inner_fn": 2} if fused else {"causal_conv1d_fn": 2, "selective_scan_fn": 2}
    assert compat.calls() == expected
    compat.reset_calls()
    model(ids, attention_mask=mask)
    assert compat.calls() == {"causal_conv1d_fn": 2, "selective_scan_fn": 2}
    compat.reset_calls()
    model.eval()
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    per_step = {"causal_conv1d_update": 4, "selective_state_update": 4}
    assert compat.calls() == {"causal_conv1d_fn": 2, "selective_scan_fn": 2, **per_step}


def test_training_mode_survives_an_error(shims):
    """The padded train path runs the mixer with `training` off for a moment."""
    model = build("falcon_mamba").train()
    mixer = model.backbone.layers[0].mixer
    with pytest.raises(RuntimeError):
        mixer(torch.zeros(1, 3, 7))
    assert mixer.training


def test_uninstall_reverses_everything(model):
    module = sys.modules[type(model).__module__]
    before = (
        list(sys.meta_path),
        set(sys.modules),
        dict(vars(module)),
        dict(vars(type(model.backbone.layers[0].mixer))),
    )
    expected = differentiate(model, True, True)
    compat.install()
    compat.install()  # a second call changes nothing
    assert compat.installed() == set(SHIMS)
    compat.uninstall()
    compat.uninstall()
    after = (
        list(sys.meta_path),
        set(sys.modules),
        dict(vars(module)),
        dict(vars(type(model.backbone.layers[0].mixer))),
    )
    assert after[0] == before[0] and after[2:] == before[2:]
    assert not [n for n in after[1] if n.partition(".")[0] in SHIMS]
    assert compat.installed() == frozenset()
    for name in SHIMS:
        assert importlib.util.find_spec(name) is None
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
    compat.reset_calls()
    with SeenOps() as seen:
        again = differentiate(model, True, True)
    assert all(torch.equal(again[n], expected[n]) for n in expected)
    assert not seen.names and not compat.calls()


def test_upstream_imports(shims):
    import causal_conv1d
    import mamba_ssm
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as same
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states_ref
    from mamba_ssm.modules.mamba_simple import Mamba
    from mamba_ssm.ops.selective_scan_interface import (  # fmt: skip  # noqa: E501
        mamba_inner_fn,
        mamba_inner_ref,
        selective_scan_fn,
        selective_scan_ref,
    )
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    assert Mamba is mamba_ssm.Mamba is nn.Mamba and same is causal_conv1d_fn
    assert mamba_ssm.ops.triton.selective_state_update.selective_state_update is selective_state_update
    assert mamba_ssm.selective_scan_fn is selective_scan_fn and mamba_ssm.mamba_inner_fn is mamba_inner_fn
    for name, module in (("mamba_ssm", mamba_ssm), ("mamba-ssm", mamba_ssm), ("causal_conv1d", causal_conv1d)):
        assert importlib.metadata.version(name) == module.__version__
    assert importlib.metadata.packages_distributions()["mamba_ssm"] == ["mamba_ssm"]
    with pytest.raises(ModuleNotFoundError):
        import mamba_ssm.modules.mamba3  # noqa: F401 (what is not there fails as on a machine without it)

    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 6, 9, generator=g), torch.rand(2, 6, 9, generator=g)
    A, B = -torch.rand(6, 4, generator=g), torch.randn(2, 4, 9, generator=g)
    scanned, expected = (f(u, delta, A, B, B, return_last_state=True) for f in (selective_scan_fn, selective_scan_ref))
    assert all(error(a, b) < 1e-5 for a, b in zip(scanned, expected))
    xz = torch.randn(2, 12, 9, generator=g)
    weights = [torch.randn(*s, generator=g) for s in ((6, 1, 4), (10, 6), (6, 2), (3, 6))]
    args = (xz, weights[0], None, *weights[1:], None, A)
    assert error(mamba_inner_fn(*args), mamba_inner_ref(*args)) < 1e-5
    x, weight = torch.randn(1, 6, 11, generator=g), torch.randn(6, 4, generator=g)
    final = torch.empty(1, 6, 3)
    out, returned = causal_conv1d_fn(x, weight, None, None, None, True, final, "silu")  # upstream's positions
    assert returned is final and torch.equal(final, x[:, :, -3:])
    bounds = torch.tensor([0, 5, 7, 11], dtype=torch.int32)
    states = causal_conv1d_varlen_states(x[0].T, bounds, 3)
    assert torch.equal(states[0], x[0, :, 2:5]) and torch.equal(states[1, :, 1:], x[0, :, 5:7])
    assert (states[1, :, 0] == 0).all() and torch.equal(states[2], x[0, :, 8:])
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x[0].T, bounds, 3))
    conv_state = x[:, :, :4].clone()
    stepped = causal_conv1d_update(x[:, :, 4], conv_state, weight, None, "silu")
    assert error(stepped, out[:, :, 4]) < 1e-5
    assert set(compat.calls()) >= {"mamba_inner_fn", "causal_conv1d_varlen_states", "causal_conv1d_update"}


def test_an_installed_package_is_left_alone(tmp_path, monkeypatch):
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.2.4'\n")
    metadata = tmp_path / "mamba_ssm-2.2.4.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mamba_ssm\nVersion: 2.2.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mamba_ssm as real

    try:
        compat.install()
        import mamba_ssm

        assert mamba_ssm is real and compat.installed() == set(SHIMS) - {"mamba_ssm"}
        assert importlib.metadata.version("mamba_ssm") == "2.2.4"
        compat.install(force=True)
        import mamba_ssm

        assert mamba_ssm.Mamba is nn.Mamba and compat.installed() == set(SHIMS)
        assert importlib.metadata.version("mamba_ssm") == mamba_ssm.__version__ != "2.2.4"
        compat.uninstall()
        import mamba_ssm

        assert mamba_ssm is real and importlib.metadata.version("mamba_ssm") == "2.2.4"
    finally:
        compat.uninstall()
        sys.modules.pop("mamba_ssm", None)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_fresh_process(order):
    """install() before and after transformers' modeling modules were imported; nothing of it falls back."""
    script = f"""
        import io, logging, sys, warnings
        warnings.simplefilter("ignore")
        from scalekern import compat
        assert "transformers" not in sys.modules
        assert not [n for n in sys.modules if n.startswith(("mamba_ssm", "causal_conv1d"))]
        if {order!r} == "before":
            compat.install()
        import torch
        from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
        MambaForCausalLM, FalconMambaForCausalLM
        if {order!r} == "after":
            compat.install()
        heard = io.StringIO()
        logging.getLogger("transformers").addHandler(logging.StreamHandler(heard))
        ids = torch.arange(1, 9).view(1, 8)
        for config, model in ((MambaConfig, MambaForCausalLM), (FalconMambaConfig, FalconMambaForCausalLM)):
            m = model(config(vocab_size=16, hidden_size=8, state_size=2, num_hidden_layers=1, eos_token_id=None))
            m.train()(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
            m.eval().generate(ids, max_new_tokens=2, do_sample=False)
        assert "falling back" not in heard.getvalue(), heard.getvalue()
        print(sorted(compat.calls().items()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = [
        ("causal_conv1d_fn", 4), ("causal_conv1d_update", 2), ("selective_scan_fn", 4), ("selective_state_update", 2),
    ]  # fmt: skip
    assert done.stdout.strip() == str(expected)


def test_accelerate_summary_and_undo(model):
    expected = differentiate(model, False, False)
    keys = list(model.state_dict())
    accelerated = accelerate(model)
    assert [row.layer for row in accelerated.summary] == [f"backbone.layers.{i}.mixer" for i in range(2)]
    assert {row.kind for row in accelerated.summary} == {type(model.backbone.layers[0].mixer).__name__}
    table = str(accelerated).splitlines()
    assert len(table) == 3 and "selective_state_update" in table[1] and "backbone.layers.1.mixer" in table[2]
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="backbone.layers.0.mixer .* was replaced already"):
        accelerate(model)
    other = build("mamba")
    with SeenOps() as seen:
        differentiate(other, False, False)
    assert not seen.names  # one instance, not its class
    accelerated.undo()
    accelerated.undo()
    with SeenOps() as seen:
        again = differentiate(model, False, False)
    assert not seen.names and all(torch.equal(again[n], expected[n]) for n in expected)


def test_accelerate_says_what_it_cannot_do():
    with pytest.raises(
        ValueError, match="Linear has no layer that scalekern replaces; supported are MambaMixer .* and Falcon"
    ):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layers.0.mixer .*activation is 'gelu'"):
        accelerate(build("mamba", hidden_act="gelu"))
    with pytest.raises(ValueError, match="width 9, and the op takes 2 to 8"):
        accelerate(build("mamba", conv_kernel=9))


@HOW
@pytest.mark.parametrize("name", ["cache", "cache_params"])
def test_both_names_of_the_cache(model, how, name):
    """transformers renamed the argument; a layer that took the new name for something else would lose its past."""
    with enter(how, model), torch.no_grad():
        (cache,) = cache_of(model(batch()[0], use_cache=True)).values()
        block, x = model.backbone.layers[0], torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(2))
        for layer in (block, block.mixer):
            positional = layer(x, copy.deepcopy(cache))
            assert torch.equal(layer(x, **{name: copy.deepcopy(cache)}), positional)
            assert not torch.equal(layer(x), positional)


class StrangeLayer:
    """A cache layer with one state, not a list of them, as transformers had it until 5.14."""

    conv_states = recurrent_states = None
    record_past = has_previous_state = False

    def update_conv_state(self, conv_states, conv_kernel_size=None): ...


def strange_forward(self, hidden_states, past=None, attention_mask=None, **kwargs): ...


@pytest.mark.parametrize("what", ["cache", "no cache", "mixer", "block"])
def test_an_unknown_transformers_is_left_alone(model, what, monkeypatch):
    block, mixer = type(model.backbone.layers[0]), type(model.backbone.layers[0].mixer)
    ids, mask = batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    if what == "cache":
        monkeypatch.setattr("transformers.cache_utils.LinearAttentionLayer", StrangeLayer)
    elif what == "no cache":
        monkeypatch.delattr("transformers.cache_utils.LinearAttentionLayer")
    else:
        monkeypatch.setattr(mixer if what == "mixer" else block, "forward", strange_forward)
    before = block.forward, mixer.forward
    with pytest.warns(UserWarning, match="does not know the Mamba layers .* Upgrade scalekern") as warned, Installed():
        assert (block.forward, mixer.forward) == before
        if what.endswith("cache"):  # transformers' own forward, on the shims
            with torch.no_grad(), SeenOps() as seen:
                got = model(ids, attention_mask=mask).logits
            assert error(got, expected) < 2e-5 and seen.names >= SEQUENCE
    assert len([w for w in warned if "does not know" in str(w.message)]) == 1  # although Mamba and FalconMamba are here
    if what != "block":  # a single model's mixers do without their blocks
        with pytest.raises(ValueError, match="layers.0.mixer .*the caches or the layers of transformers .* not known"):
            accelerate(model)


def test_an_unknown_transformers_can_be_imported():
    script = """
        import warnings
        from scalekern import compat
        compat.install()
        import torch
        import transformers.cache_utils
        del transformers.cache_utils.Cache.update_recurrent_state
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            from transformers import FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
            FalconMambaForCausalLM
            model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=2, num_hidden_layers=1))
        model.eval()(torch.arange(8)[None], use_cache=False)
        print(len([w for w in warned if "does not know" in str(w.message)]), sorted(compat.calls()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1 ['causal_conv1d_fn', 'selective_scan_fn']"
