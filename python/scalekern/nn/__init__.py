"""Layers built on the ops, with the parameters of their upstreams."""

from scalekern.nn.hyena import HyenaFilter, HyenaOperator
from scalekern.nn.mamba import Mamba
from scalekern.nn.monarch_mixer import (
    BlockdiagLinear,
    MonarchMixerBlock,
    MonarchMixerMLP,
    MonarchMixerSequenceMixing,
)
from scalekern.nn.unireplknet import DilatedReparamBlock, UniRepLKNetBlock
from scalekern.nn.wavemix import WaveMixBlock

__all__ = [
    "BlockdiagLinear",
    "DilatedReparamBlock",
    "HyenaFilter",
    "HyenaOperator",
    "Mamba",
    "MonarchMixerBlock",
    "MonarchMixerMLP",
    "MonarchMixerSequenceMixing",
    "UniRepLKNetBlock",
    "WaveMixBlock",
]
