"""Layers built on the ops, with the parameters of their upstreams."""

from scalekern.nn.mamba import Mamba

__all__ = ["Mamba"]
