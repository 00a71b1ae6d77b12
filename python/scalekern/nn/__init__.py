"""Layers built on the ops, with the parameters of their upstreams."""

from scalekern.nn.bimamba import BiMamba, BiMambaWrapper
from scalekern.nn.fit import FiTBlock
from scalekern.nn.group_mamba import GroupMamba
from scalekern.nn.h3 import H3
from scalekern.nn.hiss import HiSS
from scalekern.nn.hsm_ssd import HSMSSD
from scalekern.nn.hstu import HSTU
from scalekern.nn.hyena import HyenaFilter, HyenaOperator
from scalekern.nn.mamba import Mamba
from scalekern.nn.mamba2 import GatedRMSNorm, Mamba2
from scalekern.nn.masked_cross_attention import MaskedCrossAttention
from scalekern.nn.moa import MoAAttention
from scalekern.nn.monarch_mixer import (
    BlockdiagLinear,
    MonarchMixerBlock,
    MonarchMixerMLP,
    MonarchMixerSequenceMixing,
)
from scalekern.nn.mvar import MVARBlock
from scalekern.nn.nbp import NBPBlock
from scalekern.nn.prefix_lm import PrefixLMAttention
from scalekern.nn.quant_linear import QuantLinear
from scalekern.nn.quant_mamba import QuantMamba, QuantMamba2
from scalekern.nn.quasi_lstm import QuasiLSTM, QuasiLSTMBlock
from scalekern.nn.rglru import RGLRU
from scalekern.nn.s4 import DSS, S4, S4D
from scalekern.nn.serpent import SerpentBlock
from scalekern.nn.ss2d import SS2D
from scalekern.nn.samba_asr import SambaASRDecoder, SambaASREncoder
from scalekern.nn.unireplknet import DilatedReparamBlock, UniRepLKNetBlock
from scalekern.nn.var import VARBlock
from scalekern.nn.wavemix import WaveMixBlock

__all__ = [
    "DSS",
    "H3",
    "HSMSSD",
    "HSTU",
    "RGLRU",
    "S4",
    "S4D",
    "SS2D",
    "BiMamba",
    "BiMambaWrapper",
    "BlockdiagLinear",
    "DilatedReparamBlock",
    "FiTBlock",
    "GatedRMSNorm",
    "GroupMamba",
    "HiSS",
    "HyenaFilter",
    "HyenaOperator",
    "MVARBlock",
    "Mamba",
    "Mamba2",
    "MaskedCrossAttention",
    "MoAAttention",
    "MonarchMixerBlock",
    "MonarchMixerMLP",
    "MonarchMixerSequenceMixing",
    "NBPBlock",
    "PrefixLMAttention",
    "QuantLinear",
    "SerpentBlock",
    "SambaASRDecoder",
    "SambaASREncoder",
    "QuantMamba",
    "QuantMamba2",
    "QuasiLSTM",
    "QuasiLSTMBlock",
    "UniRepLKNetBlock",
    "VARBlock",
    "WaveMixBlock",
]
