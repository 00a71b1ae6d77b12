"""Layers built on the ops, with the parameters of their upstreams."""

from scalekern.nn.fit import FiTBlock
from scalekern.nn.h3 import H3
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
from scalekern.nn.nbp import NBPBlock
from scalekern.nn.prefix_lm import PrefixLMAttention
from scalekern.nn.quant_linear import QuantLinear
from scalekern.nn.quasi_lstm import QuasiLSTM, QuasiLSTMBlock
from scalekern.nn.rglru import RGLRU
from scalekern.nn.s4 import DSS, S4, S4D
from scalekern.nn.unireplknet import DilatedReparamBlock, UniRepLKNetBlock
from scalekern.nn.var import VARBlock
from scalekern.nn.wavemix import WaveMixBlock

__all__ = [
    "DSS",
    "H3",
    "HSTU",
    "RGLRU",
    "S4",
    "S4D",
    "BlockdiagLinear",
    "DilatedReparamBlock",
    "FiTBlock",
    "GatedRMSNorm",
    "HyenaFilter",
    "HyenaOperator",
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
    "QuasiLSTM",
    "QuasiLSTMBlock",
    "UniRepLKNetBlock",
    "VARBlock",
    "WaveMixBlock",
]
