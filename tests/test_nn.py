"""What every module of scalekern.nn does."""

import pytest
import torch

from scalekern import nn

MAKE = {
    "BlockdiagLinear": lambda **kw: nn.BlockdiagLinear(6, 10, **kw),
    "DSS": lambda **kw: nn.DSS(4, d_state=4, **kw),
    "DilatedReparamBlock": lambda **kw: nn.DilatedReparamBlock(4, 7, **kw),
    "HSTU": lambda **kw: nn.HSTU(8, max_len=16, num_buckets=4, **kw),
    "FiTBlock": lambda **kw: nn.FiTBlock(8, 2, qk_norm=True, qk_norm_weight=True, adaln_lora_dim=3, **kw),
    "GatedRMSNorm": lambda **kw: nn.GatedRMSNorm(8, group_size=4, **kw),
    "H3": lambda **kw: nn.H3(4, d_state=4, n_ssm=1, **kw),
    "HyenaFilter": lambda **kw: nn.HyenaFilter(4, seq_len=8, **kw),
    "HyenaOperator": lambda **kw: nn.HyenaOperator(4, 8, **kw),
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
    "QuasiLSTM": lambda **kw: nn.QuasiLSTM(8, 2, 3, **kw),
    "QuasiLSTMBlock": lambda **kw: nn.QuasiLSTMBlock(8, 12, 2, **kw),
    "RGLRU": lambda **kw: nn.RGLRU(8, 2, **kw),
    "S4": lambda **kw: nn.S4(4, d_state=4, l_max=8, n_ssm=2, **kw),
    "S4D": lambda **kw: nn.S4D(4, d_state=4, **kw),
    "UniRepLKNetBlock": lambda **kw: nn.UniRepLKNetBlock(8, 7, **kw),
    "VARBlock": lambda **kw: nn.VARBlock(8, 2, **kw),
    "WaveMixBlock": lambda **kw: nn.WaveMixBlock(final_dim=8, level=2, **kw),
}
# float32 whatever the dtype: as upstream; as the format's parts are
KEPT_WIDE = {
    **dict.fromkeys(("Mamba", "Mamba2"), {"A_log", "D"}),
    "QuantLinear": {"weight_scales", "weight_offsets"},
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
