"""compat.install itself: what can be imported, what is counted, what it leaves alone, and that it can be undone."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch
from compat_transformers import (  # noqa: F401
    SEQUENCE,
    SHIMS,
    Installed,
    SeenOps,
    accelerate,
    batch,
    build,
    differentiate,
    error,
    model,
    pytestmark,
    shims,
)

from scalekern import compat, nn


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
    with pytest.raises(ModuleNotFoundError, match="'mamba_ssm.modules.mamba3': scalekern.compat serves mamba_ssm wi"):
        import mamba_ssm.modules.mamba3  # noqa: F401

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
        compat.reset_calls()
        config = MambaConfig(vocab_size=16, hidden_size=8, state_size=2, num_hidden_layers=1, hidden_act="gelu")
        m = MambaForCausalLM(config)
        m.train()(ids).logits.sum().backward()
        assert compat.calls() == dict(selective_scan_fn=1), compat.calls()  # the parts that gelu leaves
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = [
        ("causal_conv1d_fn", 4), ("causal_conv1d_update", 2), ("selective_scan_fn", 4), ("selective_state_update", 2),
    ]  # fmt: skip
    assert done.stdout.strip() == str(expected)


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
