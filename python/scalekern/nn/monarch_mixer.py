"""M2-BERT's layer: a bidirectional long convolution between gates mixes the sequence, a block-diagonal MLP the width.

Shape letters: B batch, L length, M model width (d_model), I width of the MLP, K blocks, E and F as in nn.hyena.

Parameter names and shapes are those of a BertLayer of HazyResearch/m2 (bert/src/bert_layers.py and bert/src/mm), so its
checkpoints load, up to m2-bert-80M-32k:

    attention.in_linear, .out_linear  Linear: M to 3 M, and M to M
    attention.short_filter            Conv1d: weight (3 M, 1, 3), bias
    attention.filter_fn               a HyenaFilter of M channels; implicit_filter_rev for the taps that look ahead
    attention.filter_fn2              another one, on the layer's input itself, with residual_long_conv
    attention.layernorm               with hyena_training_additions
    mlp.gated_layers.weight           (K, 2 I / K, M / K), or (2 I, M) without blocks; I in place of 2 I without a gate
    mlp.wo.weight, .bias              (K, M / K, I / K) or (M, I), and (M,)
    mlp.layernorm                     LayerNorm

Source: Fu et al., Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture, 2023, sections 3 and 5.1 (M2-BERT).
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn.hyena import HyenaFilter
from scalekern.ops.causal_conv1d import causal_conv1d

LINEAR, MIXING, MLP = "nn.BlockdiagLinear", "nn.MonarchMixerSequenceMixing", "nn.MonarchMixerMLP"


class BlockdiagLinear(nn.Module):
    """A linear map of K independent blocks of features; sizes that K does not divide are padded with zeros.

    Args:
        in_features, out_features: widths.   bias: whether there is one.   nblocks: K.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_features, out_features, bias=True, nblocks=4, device=None, dtype=None):
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("nblocks", nblocks)):
            _checks.at_least(LINEAR, name, size, 1)
        factory = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = in_features, out_features
        shape = nblocks, -(-out_features // nblocks), -(-in_features // nblocks)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **factory)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.uniform_(self.weight, -(self.weight.shape[2] ** -0.5), self.weight.shape[2] ** -0.5)
        if self.bias is not None:  # by the width of the output, as upstream
            nn.init.uniform_(self.bias, -(self.out_features**-0.5), self.out_features**-0.5)

    def forward(self, x):
        blocks, _, size = self.weight.shape
        x = F.pad(x, (0, blocks * size - self.in_features)).unflatten(-1, (blocks, size))
        out = torch.einsum("...kp,kqp->...kq", x, self.weight).flatten(-2)[..., : self.out_features]
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self):
        bias, blocks = self.bias is not None, self.weight.shape[0]
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, nblocks={blocks}"


class MonarchMixerSequenceMixing(nn.Module):
    """Maps (B, L, M) to (B, L, M): x_2 (k * (x_1 v) + b x_1 v) + k_2 * u + b_2 u, projected.

    Args:
        d_model: M.   l_max: the longest sequence.   dropout: of x_1 v and of the output, with the additions.
        bidirectional: whether the filters look ahead too.   residual_long_conv: whether there is k_2.
        hyena_training_additions: a LayerNorm of the input, and dropout.
        hyena_kernel_lr, hyena_lr_pos_emb, hyena_w, hyena_w_mod, hyena_wd, hyena_emb_dim, hyena_filter_order: lr,
            lr_pos_emb, w, w_mod, wd, emb_dim and order of the HyenaFilters.
    """

    def __init__(
        self, d_model, l_max=128, dropout=0.0, hyena_kernel_lr=None, bidirectional=False, hyena_lr_pos_emb=1e-5,
        hyena_w=10, hyena_w_mod=1, hyena_wd=0.1, hyena_emb_dim=3, hyena_filter_order=16, residual_long_conv=False,
        hyena_training_additions=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.l_max = d_model, l_max

        def long_filter():
            return HyenaFilter(
                d_model, emb_dim=hyena_emb_dim, order=hyena_filter_order, seq_len=l_max, lr=hyena_kernel_lr,
                lr_pos_emb=hyena_lr_pos_emb, w=hyena_w, w_mod=hyena_w_mod, wd=hyena_wd, bidirectional=bidirectional,
                **factory,
            )  # fmt: skip

        self.filter_fn = long_filter()
        self.filter_fn2 = long_filter() if residual_long_conv else None
        self.in_linear, self.out_linear = (nn.Linear(d_model, n * d_model, **factory) for n in (3, 1))
        self.short_filter = nn.Conv1d(3 * d_model, 3 * d_model, 3, groups=3 * d_model, padding=2, **factory)
        additions = hyena_training_additions
        self.layernorm = nn.LayerNorm(d_model, **factory) if additions else None
        self.dropout = nn.Dropout(dropout if additions else 0.0)

    def forward(self, u, mask=None):
        """(B, L, M). mask (B, L) is zero or False where a row is padded: a row then gives what it gives alone."""
        _checks.tensor(MIXING, "u", u, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(MIXING, "u", u, (None, None, self.d_model))
        if u.shape[1] > self.l_max:
            raise ValueError(f"{MIXING}: u must have at most l_max = {self.l_max} tokens, got {u.shape[1]}")
        u = u if self.layernorm is None else self.layernorm(u)
        _checks.padding(MIXING, mask, u, *u.shape[:2])
        x = causal_conv1d(
            self.in_linear(u).transpose(1, 2), self.short_filter.weight.squeeze(1), self.short_filter.bias,
            # A negative seq_idx is padding: zero there, so that nothing of it reaches the long convolution.
            seq_idx=None if mask is None else (mask != 0).to(torch.int32) - 1,
        )  # fmt: skip
        x1, x2, v = x.split(self.d_model, 1)
        if self.training and self.dropout.p:
            y = self.filter_fn(self.dropout(v * x1), postgate=x2)
        else:
            y = self.filter_fn(v, pregate=x1, postgate=x2)
        if self.filter_fn2 is not None:
            y = y + self.filter_fn2(u.transpose(1, 2), mask=mask if mask is None else mask != 0).to(y.dtype)
        return self.out_linear(self.dropout(y.transpose(1, 2)))


class MonarchMixerMLP(nn.Module):
    """LayerNorm(x + wo(gelu(g) h)), (g, h) = gated_layers(x); without the gate, of gelu(gated_layers(x)).

    Args:
        hidden_size: M.   intermediate_size: I.   nblocks: K, or None for dense layers.   gated: whether there is h.
        dropout: before wo.   layer_norm_eps: the LayerNorm's.
    """

    def __init__(
        self, hidden_size, intermediate_size, nblocks=4, gated=True, dropout=0.0, layer_norm_eps=1e-12, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least(MLP, "hidden_size", hidden_size, 1)
        _checks.at_least(MLP, "intermediate_size", intermediate_size, 1)
        factory = {"device": device, "dtype": dtype}
        blocks = {} if nblocks is None else {"nblocks": nblocks}
        linear = nn.Linear if nblocks is None else BlockdiagLinear
        self.hidden_size, self.gated = hidden_size, gated
        wide = intermediate_size * (2 if gated else 1)
        self.gated_layers = linear(hidden_size, wide, bias=False, **blocks, **factory)
        self.wo = linear(intermediate_size, hidden_size, **blocks, **factory)
        self.dropout = nn.Dropout(dropout)
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, **factory)

    def forward(self, x):
        _checks.tensor(MLP, "x", x, dims=(2, 3), dtypes=_checks.FLOATING)
        _checks.shape(MLP, "x", x, (*[None] * (x.dim() - 1), self.hidden_size))
        hidden = self.gated_layers(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = F.gelu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return self.layernorm(self.wo(self.dropout(hidden)) + x)


class MonarchMixerBlock(nn.Module):
    """Maps (B, L, M) to (B, L, M): the sequence mixing, whose only residual is its own, and then the MLP.

    Args:
        hidden_size: M.   intermediate_size: I.   l_max: the longest sequence.
        monarch_mlp_nblocks: K, or None for dense layers.   use_glu_mlp: whether the MLP is gated.
        hidden_dropout_prob, layer_norm_eps: the MLP's.
        bidirectional, residual_long_conv, mixing_args: passed to MonarchMixerSequenceMixing.
    """

    def __init__(
        self, hidden_size=768, intermediate_size=3072, l_max=128, monarch_mlp_nblocks=4, use_glu_mlp=True,
        hidden_dropout_prob=0.0, layer_norm_eps=1e-12, bidirectional=True, residual_long_conv=True, device=None,
        dtype=None, **mixing_args,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attention = MonarchMixerSequenceMixing(
            hidden_size, l_max, bidirectional=bidirectional, residual_long_conv=residual_long_conv, **mixing_args,
            **factory,
        )  # fmt: skip
        self.mlp = MonarchMixerMLP(
            hidden_size, intermediate_size, monarch_mlp_nblocks, use_glu_mlp, hidden_dropout_prob, layer_norm_eps,
            **factory,
        )  # fmt: skip

    def forward(self, hidden_states, mask=None):
        """(B, L, M); mask as for the sequence mixing."""
        return self.mlp(self.attention(hidden_states, mask))
