"""HiSS: a state space model over the tokens of each chunk, and one over what is left of the chunks.

Shape letters: B batch, L tokens, K tokens of a chunk, C chunks, ceil(L / K), I inputs, O outputs, M width of the upper
level (d_model), E width of the lower one (d_low).

Source: Bhirangi et al., Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling, 2024, section 4.
"""

import torch
from torch import nn

from scalekern import _checks
from scalekern.nn.mamba import Mamba
from scalekern.nn.mamba2 import Mamba2
from scalekern.nn.s4 import S4D

NAME = "nn.HiSS"
LAYERS = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4d": lambda width, **options: S4D(width, transposed=False, **options),
}


class HiSS(nn.Module):
    """Maps (B, L, I) to (B, C, O): an output a chunk of K tokens, from all tokens up to its end.

    The lower level starts afresh at each chunk, and what it gives for the chunk's last token is the upper level's
    token. A last chunk of fewer tokens counts as it is; upstream takes whole chunks only.

    Args:
        d_input: I.   d_output: O.   d_model: M.   d_low: E.   chunk_size: K.
        low, high: "mamba", "mamba2" or "s4d", the layers of each level.   n_low, n_high: how many, each behind a
            LayerNorm and beside a residual path.   low_options, high_options: for them, as d_state.

    Raises:
        ValueError: a layer of another name, a chunk_size below 1.

    Source: Bhirangi et al., HiSS, 2024, section 4.
    """

    def __init__(
        self, d_input, d_output, d_model=64, d_low=128, chunk_size=10, low="mamba", high="mamba", n_low=1, n_high=1,
        low_options=None, high_options=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least(NAME, "chunk_size", chunk_size, 1)
        factory = {"device": device, "dtype": dtype}
        self.d_input, self.chunk_size = d_input, chunk_size
        self.embed, self.pool = nn.Linear(d_input, d_low, **factory), nn.Linear(d_low, d_model, **factory)
        self.low = Stack("low", low, n_low, d_low, {**(low_options or {}), **factory})
        self.high = Stack("high", high, n_high, d_model, {**(high_options or {}), **factory})
        self.output = nn.Linear(d_model, d_output, **factory)

    def new_cache(self):
        """What `forward` and `step` take as their cache before the first token."""
        return Cache()

    def forward(self, x, *, cache=None):
        """A whole sequence, or its next tokens.

        Args:
            x: (B, L, I).
            cache: of `new_cache`, holds the states after the tokens so far and moves on. Gradients flow through it.

        Returns:
            (B, C, O). With a cache the first output is that of the chunk under way, which x continues; an output of a
            chunk that x does not end is what it would be if the sequence ended there.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        _checks.tensor(NAME, "x", x, dims=3, dtypes=_checks.taken_by(self.embed))
        _checks.shape(NAME, "x", x, (None, None, self.d_input))
        if x.shape[1] == 0:
            return self.output(x.new_zeros(x.shape[0], 0, self.output.in_features))
        keep, K = cache is not None, self.chunk_size
        cache = cache if keep else self.new_cache()
        begun = min(x.shape[1], -cache.tokens % K)
        count = (x.shape[1] - begun) // K
        first, whole, last = x.tensor_split([begun, begun + count * K], 1)
        features = []
        if begun:
            feature, cache.low = self._feature(first, cache.low, True)
            features.append(feature)
        if count:
            feature, _ = self._feature(whole.reshape(-1, K, self.d_input))
            features.append(feature.view(x.shape[0], count, self.pool.out_features))
        if last.shape[1]:
            feature, cache.low = self._feature(last, None, keep)
            features.append(feature)
        cache.tokens = (cache.tokens + x.shape[1]) % K
        features = torch.cat(features, 1)
        if not keep:
            return self.output(self.high(features)[0])
        ended, outs = features.shape[1] - (cache.tokens > 0), []
        if ended:
            y, cache.high = self.high(features[:, :ended], cache.high, True)
            outs.append(y)
        if cache.tokens:  # the upper level moves on only where a chunk ends
            outs.append(self.high(features[:, ended:], cache.high, True)[0])
        return self.output(torch.cat(outs, 1))

    def step(self, x, cache):
        """One token, x (B, I): the output (B, O) of the chunk that it is part of, if the sequence ended there."""
        return self.forward(x.unsqueeze(1), cache=cache).squeeze(1)

    def _feature(self, x, states=None, keep=False):
        """(what the lower level gives for the last token, (B, 1, M); the states after it)"""
        y, states = self.low(self.embed(x), states, keep)
        return self.pool(y[:, -1:]), states


class Cache:
    """Tokens of the chunk under way, the lower level's states after them, the upper level's after the chunks before."""

    tokens, low, high = 0, None, None


class Stack(nn.Module):
    """x + layer(LayerNorm(x)), layer by layer, and a LayerNorm behind the last."""

    def __init__(self, which, kind, depth, width, options):
        super().__init__()
        _checks.choice(NAME, which, kind, tuple(LAYERS))
        factory = {key: options[key] for key in ("device", "dtype")}
        self.initial = "initial_state" if kind == "s4d" else "initial_states"
        self.wanted = "return_last_state" if kind == "s4d" else "return_final_states"
        self.layers = nn.ModuleList([LAYERS[kind](width, **options) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(width, **factory) for _ in range(depth + 1)])

    def forward(self, x, states=None, keep=False):
        """x (B, L, width) and each layer's states before it to the same after it.

        Without `keep` there are none: S4D is its convolution then, and Mamba recomputes what it would keep to train.
        """
        after = []
        for layer, norm, before in zip(self.layers, self.norms, states or [None] * len(self.layers)):
            y = layer(norm(x), **({self.initial: before, self.wanted: True} if keep else {}))
            y, state = y if keep else (y, None)
            x = x + y
            after.append(state)
        return self.norms[-1](x), after
