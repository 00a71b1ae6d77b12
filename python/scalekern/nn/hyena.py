"""Hyena: long convolutions between gates, with filters that a small network computes from the position.

Shape letters: B batch, L length, M model width (d_model), O depth of the recurrence (order), D channels of a filter,
E width of the position's embedding (emb_dim), F width of the filter's network (its order), W short filter width.

Parameter names and shapes are those of HazyResearch/safari's src/models/sequence/hyena.py, so its checkpoints load:

    in_proj, out_proj                     Linear: M to (O + 1) M, and M to M
    short_filter                          Conv1d: weight ((O + 1) M, 1, W), bias
    filter_fn.bias                        (D,), D = (O - 1) M
    filter_fn.pos_emb.z, .t               (1, l_max, E), a parameter, and (1, l_max, 1), a buffer
    filter_fn.implicit_filter.0, 2, 4, .. Linear: E to F, F to F, .., and F to D without a bias
    filter_fn.implicit_filter.1, 3, ..    freq (1, F), one parameter under all of these names
    filter_fn.modulation.deltas           (1, 1, D), a buffer

Channel m of step o is channel m (O - 1) + o of the filter. (safari's standalone_hyena.py has o M + m, which is the same
for the usual O = 2.)

Source: Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, 2023, sections 3.1 to 3.3 and
appendix D.3.
"""

import math

import torch
from torch import nn

from scalekern import _checks
from scalekern._library import autocast_off
from scalekern.nn._optim import hint, register
from scalekern.ops.causal_conv1d import causal_conv1d
from scalekern.ops.fft_conv import fft_conv

FILTER, OPERATOR = "nn.HyenaFilter", "nn.HyenaOperator"


class Sin(nn.Module):
    """sin(w_mod freq x) with a frequency for every feature, freq (1, F)."""

    def __init__(self, freq, w_mod=1):
        super().__init__()
        self.freq, self.w_mod = freq, w_mod

    def forward(self, x):
        return torch.sin(self.w_mod * self.freq * x)


class PositionalEmbedding(nn.Module):
    """z (1, seq_len, E): the time t from 0 to 1, cos and -sin of 2 pi f p / seq_len at position p, (E - 1) / 2 f's."""

    def __init__(self, emb_dim, seq_len, lr_pos_emb=1e-5, device=None, dtype=None):
        super().__init__()
        bands = (emb_dim - 1) // 2
        t, position = (torch.linspace(0, last, seq_len, dtype=torch.float64)[:, None] for last in (1, seq_len - 1))
        angle = 2 * math.pi / seq_len * position * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
        z = torch.cat([t, angle.cos(), -angle.sin()], -1)
        for name, value, lr in (("z", z, lr_pos_emb), ("t", t, 0.0)):
            register(self, name, value[None].to(device=device, dtype=dtype), lr)

    def forward(self, L):
        return self.z[:, :L], self.t[:, :L]


class ExponentialModulation(nn.Module):
    """x (exp(-t |deltas|) + shift): channels that forget at rates from slow to fast."""

    def __init__(
        self, d_model, fast_decay_pct=0.3, slow_decay_pct=1.5, target=1e-2, modulation_lr=0.0, shift=0.0, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.shift = shift
        slow, fast = math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct
        deltas = torch.linspace(slow, fast, d_model, device=device, dtype=dtype)[None, None]
        register(self, "deltas", deltas, modulation_lr)

    def forward(self, t, x):
        return x * (torch.exp(-t * self.deltas.abs()) + self.shift)


class HyenaFilter(nn.Module):
    """A long filter for each of D channels, a function of the position alone, and the convolution with it.

    Args:
        d_model: D.   emb_dim: E, odd, from 3.   order: F.   seq_len: the longest filter.
        lr, lr_pos_emb, modulation_lr, wd: marks for an optimizer, see nn._optim; 0 makes z or deltas a buffer.
        w: initial frequency of the sines.   w_mod: multiplies it, untrained.   num_inner_mlps: F to F layers.
        modulate: whether the filter decays.   fast_decay_pct, slow_decay_pct, target: the fastest and the slowest
            channel fall to `target` after these fractions of seq_len.   shift: what they decay to.
        normalized: divide each position of the filter by the sum of its channels' absolute values, as upstream.
        bidirectional: a second network, implicit_filter_rev, for the taps that look ahead.
        dtype: that of the parameters, and at least float32: bfloat16 cannot tell one position from the next.

    Raises:
        ValueError: an even emb_dim or one below 3; a size below 1.
    """

    def __init__(
        self, d_model, emb_dim=3, order=16, seq_len=1024, lr=1e-3, lr_pos_emb=1e-5, w=1, w_mod=1, wd=0.0,
        num_inner_mlps=2, modulate=True, fast_decay_pct=0.3, slow_decay_pct=1.5, target=1e-2, modulation_lr=0.0,
        shift=0.0, normalized=False, bidirectional=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if not isinstance(emb_dim, int) or emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"{FILTER}: emb_dim must be odd and at least 3 (time, cosine and sine), got {emb_dim!r}")
        for name, size in (("d_model", d_model), ("order", order), ("seq_len", seq_len)):
            _checks.at_least(FILTER, name, size, 1)
        _checks.at_least(FILTER, "num_inner_mlps", num_inner_mlps, 0)
        factory = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        self.d_model, self.emb_dim, self.seq_len, self.bidirectional = d_model, emb_dim, seq_len, bidirectional
        self.modulate, self.normalized = modulate, normalized
        self.bias = nn.Parameter(torch.randn(d_model, **factory))
        self.pos_emb = PositionalEmbedding(emb_dim, seq_len, lr_pos_emb, **factory)
        # One for all layers and both directions: the parameter, and not the module, which functional_call would leave
        # with the tensor that it put in.
        freq = nn.Parameter(torch.full((1, order), float(w), **factory))
        widths = [emb_dim, *[order] * (num_inner_mlps + 1)]

        def network():
            pairs = [(nn.Linear(*pair, **factory), Sin(freq, w_mod)) for pair in zip(widths, widths[1:])]
            hidden = [layer for pair in pairs for layer in pair]
            return nn.Sequential(*hidden, nn.Linear(order, d_model, bias=False, **factory))

        self.implicit_filter = network()
        if bidirectional:
            self.implicit_filter_rev = network()
        self.modulation = ExponentialModulation(
            d_model, fast_decay_pct, slow_decay_pct, target, modulation_lr, shift, **factory
        )
        for name, parameter in self.named_parameters():
            if name.startswith("implicit_filter"):
                hint(parameter, lr, wd)

    def _apply(self, fn, recurse=True):
        """A move from the meta device makes a new parameter for every name: they are made one again."""
        super()._apply(fn, recurse)
        sines = [module for module in self.modules() if isinstance(module, Sin)]
        for sine in sines[1:]:
            sine.freq = sines[0].freq
        return self

    def filter(self, L):
        """The taps that look back, (1, L, D); tap 0 meets the current token."""
        return self._evaluate(self.implicit_filter, L)

    def filter_rev(self, L):
        """The taps that look ahead, (1, L, D); tap 0 meets the next token."""
        return self._evaluate(self.implicit_filter_rev, L)

    def _evaluate(self, network, L):
        if not 0 <= L <= self.seq_len:
            raise ValueError(f"{FILTER}: L must be at most seq_len = {self.seq_len}, got {L}")
        z, t = self.pos_emb(L)
        # Autocast would round what every sample's output depends on, in a network that costs a B-th of the layer's.
        with autocast_off(z.device.type):
            h = network(z)
            h = self.modulation(t, h) if self.modulate else h
            return h / h.abs().sum(-1, keepdim=True) if self.normalized else h

    def forward(self, x, pregate=None, postgate=None, mask=None):
        """postgate (k * v + bias v), v = pregate x.

        Args:
            x, pregate, postgate: (B, D, L).   mask: (B, L), zero where a token is hidden.

        Returns:
            (B, D, L).
        """
        L, k_reverse = max(x.shape[-1], 1), None
        if self.bidirectional:  # fft_conv's reverse tap 0 meets the current token, which k has
            k_reverse = torch.nn.functional.pad(self.filter_rev(L)[0].T, (1, 0))
        return fft_conv(
            x, self.filter(L)[0].T, k_reverse=k_reverse, skip=self.bias, pregate=pregate, postgate=postgate, mask=mask
        )


class HyenaOperator(nn.Module):
    """Maps (B, L, M) to (B, L, M), causally: v <- k_o * (x_o v) + b_o x_o v for each o, and x_0 v projected.

    Args:
        d_model: M.   l_max: the longest sequence.   order: O, from 2.   filter_order: F.
        dropout: of x_o v.   short_filter_order: W, 2 to 8.   filter_args: passed to HyenaFilter.

    Upstream's num_heads, num_blocks, inner_factor, outer_mixing and post_order_ffn stay at their defaults here.

    Raises:
        ValueError: an order below 2, a short filter of an unsupported width, or what HyenaFilter raises.
    """

    def __init__(
        self, d_model, l_max, order=2, filter_order=64, dropout=0.0, short_filter_order=3, device=None, dtype=None,
        **filter_args,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least(OPERATOR, "order", order, 2)
        _checks.at_least(OPERATOR, "d_model", d_model, 1)
        _checks.choice(OPERATOR, "short_filter_order", short_filter_order, range(2, 9))
        if filter_args.get("bidirectional"):
            raise ValueError(f"{OPERATOR}: bidirectional must be False, the operator is causal, got True")
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.l_max, self.order = d_model, l_max, order
        width = (order + 1) * d_model
        self.in_proj, self.out_proj = nn.Linear(d_model, width, **factory), nn.Linear(d_model, d_model, **factory)
        self.short_filter = nn.Conv1d(
            width, width, short_filter_order, groups=width, padding=short_filter_order - 1, **factory
        )
        self.filter_fn = HyenaFilter(d_model * (order - 1), order=filter_order, seq_len=l_max, **filter_args, **factory)
        self.dropout = nn.Dropout(dropout)

    def filters(self, L):
        """The long filters (O - 1, M, L)."""
        return self._by_step(self.filter_fn.filter(L)[0].T)

    def _by_step(self, channels):
        """(M (O - 1), ..) to (O - 1, M, ..)."""
        return channels.unflatten(0, (self.d_model, self.order - 1)).transpose(0, 1)

    def forward(self, u, *, mask=None, initial_states=None, return_final_states=False, filters=None):
        """Run a whole sequence, or its next tokens.

        Args:
            u: (B, L, M).
            mask: (B, L), zero or False where a row is padded; not with initial_states.
            initial_states: (conv_state, history) before the first token. Not changed; gradients flow into them.
            return_final_states: also return them after the last token. A filter without a recurrence needs every input
                it has seen: `history` grows with the sequence, and a token costs O(its position).
            filters: `self.filters(l)` for an l that covers the sequence so far, which then is not computed anew: what
                decoding should pass.

        Returns:
            (B, L, M), or ((B, L, M), (conv_state (B, (O + 1) M, W - 1), history (O - 1, B, M, tokens so far))).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape; more than l_max tokens.
        """
        _checks.tensor(OPERATOR, "u", u, dims=3, dtypes=_checks.taken_by(self.in_proj))
        _checks.shape(OPERATOR, "u", u, (None, None, self.d_model))
        _checks.padding(OPERATOR, mask, u, *u.shape[:2])
        if initial_states is not None and not (isinstance(initial_states, (tuple, list)) and len(initial_states) == 2):
            raise TypeError(f"{OPERATOR}: initial_states must be (conv_state, history), got {initial_states!r}")
        if mask is not None and initial_states is not None:
            raise ValueError(f"{OPERATOR}: mask goes with no initial_states, whose padding is over")
        conv_state, history = (None, None) if initial_states is None else initial_states
        past = 0 if history is None else history.shape[-1]
        total = past + u.shape[1]
        if total > self.l_max:
            raise ValueError(f"{OPERATOR}: the sequence must have at most l_max = {self.l_max} tokens, got {total}")
        k = self.filters(max(total, 1)) if filters is None else filters[..., : max(total, 1)]
        bias = self._by_step(self.filter_fn.bias)
        x, conv_state = causal_conv1d(
            self.in_proj(u).transpose(1, 2), self.short_filter.weight.squeeze(1), self.short_filter.bias,
            # A negative seq_idx is padding: zero there, so that nothing of it reaches the long convolution.
            seq_idx=None if mask is None else (mask != 0).to(torch.int32) - 1, initial_states=conv_state,
            return_final_states=True,
        )  # fmt: skip
        *gates, v = x.split(self.d_model, 1)
        seen = []
        for o, gate in enumerate(reversed(gates[1:])):
            last = gates[0] if o == self.order - 2 else None
            if past == 0 and not return_final_states and not (self.training and self.dropout.p):
                v = fft_conv(v, k[o], skip=bias[o], pregate=gate, postgate=last)
                continue
            v = self.dropout(v * gate)
            seen.append(v if past == 0 else torch.cat([history[o].to(v.dtype), v], -1))
            v = self._next(seen[-1], k[o], bias[o], past)
            v = v if last is None else v * last
        out = self.out_proj(v.transpose(1, 2))
        return (out, (conv_state, torch.stack(seen))) if return_final_states else out

    @staticmethod
    def _next(window, k, bias, past):
        """The convolution's outputs at the tokens of the window from `past` on."""
        if window.shape[-1] != past + 1:
            return fft_conv(window, k, skip=bias)[..., past:]
        wide = window.to(torch.promote_types(window.dtype, k.dtype))  # one token: a dot product over its past
        out = torch.linalg.vecdot(wide, k.flip(-1))[..., None] + bias[:, None] * wide[..., past:]
        return out.to(window.dtype)

    def step(self, u, states, filters=None):
        """One token: u (B, 1, M) -> (out (B, 1, M), states); see `forward`."""
        _checks.tensor(OPERATOR, "u", u, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(OPERATOR, "u", u, (None, 1, self.d_model))
        return self.forward(u, initial_states=states, return_final_states=True, filters=filters)

    def allocate_inference_cache(self, batch_size, max_seqlen=None, dtype=None):
        """The states before the first token: conv_state zero, and an empty history."""
        weight = self.in_proj.weight
        weight = weight if dtype is None else weight.to(dtype)
        width, taps = self.short_filter.weight.shape[0], self.short_filter.kernel_size[0]
        return (
            weight.new_zeros(batch_size, width, taps - 1),
            weight.new_zeros(self.order - 1, batch_size, self.d_model, 0),
        )
