"""What every module of scalekern.nn does."""

import pytest
import torch

from scalekern import nn

MAKE = {
    "BiMamba": lambda **kw: nn.BiMamba(8, d_state=4, **kw),
    "BiMambaWrapper": lambda **kw: nn.BiMambaWrapper(8, mixer="mamba2", d_state=4, headdim=4, **kw),
    "BlockdiagLinear": lambda **kw: nn.BlockdiagLinear(6, 10, **kw),
    "DSS": lambda **kw: nn.DSS(4, d_state=4, **kw),
    "DilatedReparamBlock": lambda **kw: nn.DilatedReparamBlock(4, 7, **kw),
    "HSMSSD": lambda **kw: nn.HSMSSD(8, state_dim=3, **kw),
    "HSTU": lambda **kw: nn.HSTU(8, max_len=16, num_buckets=4, **kw),
    "FiTBlock": lambda **kw: nn.FiTBlock(8, 2, qk_norm=True, qk_norm_weight=True, adaln_lora_dim=3, **kw),
    "GatedRMSNorm": lambda **kw: nn.GatedRMSNorm(8, group_size=4, **kw),
    "GroupMamba": lambda **kw: nn.GroupMamba(8, d_state=2, **kw),
    "H3": lambda **kw: nn.H3(4, d_state=4, n_ssm=1, **kw),
    "HiSS": lambda **kw: nn.HiSS(3, 2, 4, 4, high="s4d", low_options={"d_state": 4}, **kw),
    "HyenaFilter": lambda **kw: nn.HyenaFilter(4, seq_len=8, **kw),
    "HyenaOperator": lambda **kw: nn.HyenaOperator(4, 8, **kw),
    "MVARBlock": lambda **kw: nn.MVARBlock(8, 2, d_state=4, headdim=8, **kw),
    "Mamba": lambda **kw: nn.Mamba(8, d_state=4, **kw),
    "Mamba2": lambda **kw: nn.Mamba2(8, d_state=4, headdim=4, ngroups=2, **kw),
    "MaskedCrossAttention": lambda **kw: nn.MaskedCrossAttention(8, 2, **kw),
    "MoAAttention": lambda **kw: nn.MoAAttention(8, 2, [2, 4], [0, 0.5], **kw),
    "MonarchMixerBlock": lambda **kw: nn.MonarchMixerBlock(8, 16, l_max=8, **kw),
    "MonarchMixerMLP": lambda **kw: nn.MonarchMixerMLP(8, 16, **kw),
    "MonarchMixerSequenceMixing": lambda **kw: nn.MonarchMixerSequenceMixing(8, l_max=8, **kw),
    "NBPBlock": lambda **kw: nn.NBPBlock(8, 2, **kw),
    "PrefixLMAttention": lambda **kw: nn.PrefixLMAttention(8, 2, mp_num=1, **kw),
    "QuantLinear": lambda **kw: nn.QuantLinear(8, 6, format="int1", group_size=4, **kw),
    "QuantMamba": lambda **kw: nn.QuantMamba(8, d_state=4, channel_groups=2, **kw),
    "QuantMamba2": lambda **kw: nn.QuantMamba2(8, d_state=4, headdim=4, ngroups=2, state_dtype=torch.int8, **kw),
    "QuasiLSTM": lambda **kw: nn.QuasiLSTM(8, 2, 3, **kw),
    "QuasiLSTMBlock": lambda **kw: nn.QuasiLSTMBlock(8, 12, 2, **kw),
    "RGLRU": lambda **kw: nn.RGLRU(8, 2, **kw),
    "S4": lambda **kw: nn.S4(4, d_state=4, l_max=8, n_ssm=2, **kw),
    "S4D": lambda **kw: nn.S4D(4, d_state=4, **kw),
    "SS2D": lambda **kw: nn.SS2D(8, d_state=4, **kw),
    "SerpentBlock": lambda **kw: nn.SerpentBlock(4, scales=2, d_state=2, **kw),
    "SambaASRDecoder": lambda **kw: nn.SambaASRDecoder(7, 8, 1, 2, {"d_state": 2}, **kw),
    "SambaASREncoder": lambda **kw: nn.SambaASREncoder(3, 8, 1, {"d_state": 2}, **kw),
    "UniRepLKNetBlock": lambda **kw: nn.UniRepLKNetBlock(8, 7, **kw),
    "VARBlock": lambda **kw: nn.VARBlock(8, 2, **kw),
    "WaveMixBlock": lambda **kw: nn.WaveMixBlock(final_dim=8, level=2, **kw),
}
# float32 whatever the dtype: as upstream; as the format's parts are
KEPT_WIDE = {
    **dict.fromkeys(("Mamba", "Mamba2"), {"A_log", "D"}),
    "GroupMamba": {f"mamba_g{k}.{name}" for k in range(1, 5) for name in ("A_logs", "Ds")},
    "SS2D": {"A_logs", "Ds"},
    "SerpentBlock": {f"{at}.0.op.{name}" for at in ("down.0", "down.1", "up.0") for name in ("A_logs", "Ds")},
    "BiMamba": {"A_log", "A_b_log", "D", "D_b"},
    "BiMambaWrapper": {f"mamba_{side}.{name}" for side in ("fwd", "rev") for name in ("A_log", "D")},
    "MVARBlock": {"mamba.A_log", "mamba.D"},
    **dict.fromkeys(("SambaASRDecoder", "SambaASREncoder"), {"layers.0.A_log", "layers.0.D"}),
    "HiSS": {"low.layers.0.A_log", "low.layers.0.D"},
    "QuantLinear": {"weight_scales", "weight_offsets"},
    **dict.fromkeys(("QuantMamba", "QuantMamba2"), {
        "A_log", "D", *(f"{name}_steps" for name in ("x", "B", "C", "conv", "state")),
        *(f"{name}_proj.{part}" for name in ("in", "x", "out") for part in ("weight_scales", "rotation_signs")),
    }),
}


def test_every_module_is_here():
    assert sorted(MAKE) == sorted(nn.__all__)


@pytest.mark.parametrize("name", MAKE)
def test_device_and_dtype(name):
    """All tensors lie where they were asked for, in that dtype, each in memory of its own."""
    module = MAKE[name](device="meta", dtype=torch.float64)
    for key, t in module.state_dict().items():
        assert t.device.type == "meta", key
        assert t.dtype == torch.float64 or not t.is_floating_point() or key in KEPT_WIDE.get(name, ()), key
    module = MAKE[name](dtype=torch.float64)
    for key, t in module.named_parameters():
        assert t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes, key  # no view of something larger
        assert t.isfinite().all(), key


INPUTS = {
    **dict.fromkeys(("BiMamba", "BiMambaWrapper", "Mamba", "Mamba2", "RGLRU"), (2, 6, 8)),
    **dict.fromkeys(("DSS", "H3", "HyenaOperator", "S4", "S4D"), (2, 4, 4)),
    "HiSS": (2, 6, 3), "SS2D": (2, 4, 4, 8), "SambaASREncoder": (2, 3, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_another_dtype_is_named(name):
    """As that of whose layer; torch says which two dtypes do not fit. Under autocast it fits."""
    module, x = MAKE[name](), torch.randn(INPUTS[name])
    with pytest.raises(TypeError, match=r"^nn\.\w+: \w+ must have dtype float32, got float64$"):
        module(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        module(x.bfloat16())
