"""Layers built on the ops, with the parameters of their upstreams."""

from scalekern.nn.hyena import HyenaFilter, HyenaOperator
from scalekern.nn.mamba import Mamba

__all__ = ["HyenaFilter", "HyenaOperator", "Mamba"]
