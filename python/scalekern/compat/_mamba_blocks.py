"""The layers of mamba_ssm's language model beside Mamba: norms with a residual, gated MLP, attention, block.

Shape letters: B batch, L length, M model width, H heads, P head dim, W filter width.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks, masks
from scalekern.compat._shims import counted
from scalekern.nn import Mamba2
from scalekern.nn._attention import angles, check_heads, merge, rotate, split
from scalekern.ops.causal_conv1d import causal_conv1d
from scalekern.ops.sparse_attention import sparse_attention


def at_least_float32(*tensors):
    types = (t.dtype for t in tensors if t is not None)
    return functools.reduce(torch.promote_types, types, torch.float32)


@counted("layer_norm_fn")
def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False,
):  # fmt: skip
    """norm(dropout(x rowscale) + dropout(x1) + residual) weight + bias, in x's dtype; the sum in float32 or wider.

    Returns that, then, where asked for: the same with weight1 and bias1; the sum (prenorm), in residual's dtype or,
    without one, in x's or float32; the masks of x's and x1's dropout.
    """
    wide = at_least_float32(x, residual)
    branches = [x.to(wide) if rowscale is None else x.to(wide) * rowscale[..., None].to(wide)]
    branches += [] if x1 is None else [x1.to(wide)]
    kept = [None, None]
    if dropout_p > 0.0:
        kept[: len(branches)] = [torch.rand_like(branch) >= dropout_p for branch in branches]
        branches = [torch.where(mask, branch / (1 - dropout_p), 0) for mask, branch in zip(kept, branches)]
    branches += [] if residual is None else [residual.to(wide)]
    total = functools.reduce(torch.add, branches)
    stream = (at_least_float32(x) if residual_in_fp32 else x.dtype) if residual is None else residual.dtype
    out = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    out += [] if weight1 is None else [_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype)]
    out += [total.to(stream)] if prenorm else []
    out += kept if return_dropout_mask else []
    return out[0] if len(out) == 1 else tuple(out)


def _norm(x, weight, bias, eps, is_rms_norm):
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out = F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if bias is None else out + bias


def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, return_dropout_mask=False,
):  # fmt: skip
    """layer_norm_fn without a mean."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, dropout_p=dropout_p, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def add_norm(norm, hidden_states, residual, fused, residual_in_fp32):
    """(the norm of their sum, the sum). Unfused through the module itself: any norm will do, and hooks run."""
    if fused:
        return layer_norm_fn(
            hidden_states, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True,
            residual_in_fp32=residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    residual = hidden_states if residual is None else hidden_states + residual
    out = norm(residual.to(norm.weight.dtype))
    return out, residual.to(at_least_float32(residual)) if residual_in_fp32 else residual


class GatedMLP(nn.Module):
    """fc2(y activation(gate)), (y, gate) = fc1(x); the hidden width is rounded up to a multiple of `multiple_of`."""

    def __init__(
        self, in_features, hidden_features=None, out_features=None, activation=F.silu, bias=False, multiple_of=128,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))


class MHA(nn.Module):
    """Self-attention with grouped heads, rotary positions, a short convolution over q, k and v, and a gated MLP beside
    it, as far as the arguments, which are upstream's, ask for them. On scalekern.sparse_attention: P at most 256.

    inference_params: the keys, values and the convolution's last inputs live there. `lengths_per_sample` is refused:
    all rows are as long as seqlen_offset says.
    """

    def __init__(
        self, embed_dim, num_heads, num_heads_kv=None, head_dim=None, mlp_dim=0, qkv_proj_bias=True, out_proj_bias=True,
        softmax_scale=None, causal=False, layer_idx=None, d_conv=0, rotary_emb_dim=0, rotary_emb_base=10000.0,
        rotary_emb_interleaved=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        check_heads("MHA", num_heads, self.num_heads_kv, "num_heads_kv")
        self.head_dim = check_heads("MHA", embed_dim, num_heads) if head_dim is None else head_dim
        self.mlp_dim, self.softmax_scale, self.causal = math.ceil(mlp_dim / 256) * 256, softmax_scale, causal
        self.layer_idx, self.d_conv = layer_idx, d_conv
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **factory)
        if d_conv > 0:
            self.conv1d = nn.Conv1d(qkv_dim, qkv_dim, d_conv, padding=d_conv - 1, groups=qkv_dim, **factory)
        width = self.head_dim * num_heads + self.mlp_dim // 2
        self.out_proj = nn.Linear(width, embed_dim, bias=out_proj_bias, **factory)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        """(keys and values (B, max_seqlen, 2, H, P), the convolution's last inputs or None)"""
        new = functools.partial(self.out_proj.weight.new_zeros, dtype=dtype)
        conv_state = new((batch_size, self.conv1d.weight.shape[0], self.d_conv)) if self.d_conv > 0 else None
        return new((batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)), conv_state

    def forward(self, x, inference_params=None):
        """x (B, L, M) -> (B, L, M): a whole sequence, or its next tokens."""
        kv_cache, conv_state, offset = None, None, 0
        if inference_params is not None:
            kv_cache, conv_state = self._cache(inference_params, x)
            offset = inference_params.seqlen_offset
        qkv, mlp = self.in_proj(x).tensor_split([self.in_proj.out_features - self.mlp_dim], -1)
        if self.d_conv > 0:
            qkv = self._conv(qkv, conv_state, offset)
        widths = [n * self.head_dim for n in (self.num_heads, self.num_heads_kv, self.num_heads_kv)]
        q, k, v = (split(part, self.head_dim) for part in qkv.split(widths, -1))  # [B, H, L, P]
        if self.rotary_emb_dim > 0:
            turn = angles(offset + torch.arange(x.shape[1], device=x.device), self.rotary_emb_dim, self.rotary_emb_base)
            q, k = self._rotated(q, turn), self._rotated(k, turn)
        if kv_cache is not None:
            k, v = self._keep(k, v, kv_cache, offset)
        mask = None
        if self.causal and x.shape[1] > 1:  # one token sees everything; a shifted mask would need a plan for each
            mask = masks.causal.shift(offset, 0) if offset else masks.causal
        out = merge(sparse_attention(q, k, v, mask, scale=self.softmax_scale))
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, -1)
            out = torch.cat([out, up * F.silu(gate)], -1)
        return self.out_proj(out)

    def _cache(self, inference_params, x):
        if self.layer_idx is None:
            raise ValueError("MHA: inference_params need a layer_idx, which this layer was built without")
        if getattr(inference_params, "lengths_per_sample", None) is not None:
            raise ValueError("MHA: rows of different lengths (lengths_per_sample) are not served")
        end, most = inference_params.seqlen_offset + x.shape[1], inference_params.max_seqlen
        if end > most:
            raise ValueError(f"MHA: inference_params hold {most} tokens (max_seqlen), got {end}")
        cache, first = inference_params.key_value_memory_dict, getattr(inference_params, "batch_size_offset", 0)
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(x.shape[0], most, x.dtype)
        return (t if t is None else t[first : first + x.shape[0]] for t in cache[self.layer_idx])

    def _conv(self, qkv, state, offset):
        before = None if state is None or offset == 0 else state[..., 1:].to(qkv.dtype)
        out, after = causal_conv1d(
            qkv.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, initial_states=before,
            return_final_states=True,
        )  # fmt: skip
        if state is not None:
            state[..., 1:] = after.detach()  # the oldest of a state's W inputs is no longer read by anything
        return out.transpose(1, 2)

    def _rotated(self, x, turn):
        x, rest = x.tensor_split([self.rotary_emb_dim], -1)
        return torch.cat([rotate(x, turn, self.rotary_emb_interleaved), rest], -1)

    def _keep(self, k, v, kv_cache, offset):
        """All keys and values so far. The first ones as they came: gradients flow into them."""
        end = offset + k.shape[2]
        kv_cache[:, offset:end] = torch.stack((k, v)).detach().permute(1, 3, 0, 2, 4)
        return (k, v) if offset == 0 else kv_cache[:, :end].to(k.dtype).permute(2, 0, 3, 1, 4).unbind()


class Mamba2Simple(Mamba2):
    """Mamba2 without a cache, and with an initial state of the scan that can be learned: init_states (H, P, N)."""

    def __init__(
        self, d_model, d_state=64, d_conv=4, conv_init=None, expand=2, headdim=128, ngroups=1, A_init_range=(1, 16),
        dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4, dt_limit=(0.0, float("inf")), learnable_init_states=False,
        activation="swish", bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=True, layer_idx=None,
        device=None, dtype=None,
    ):  # fmt: skip
        _checks.choice("Mamba2Simple", "activation", activation, ("silu", "swish"))
        super().__init__(
            d_model, d_state, d_conv, conv_init, expand, headdim, ngroups=ngroups, A_init_range=A_init_range,
            dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias,
            conv_bias=conv_bias, layer_idx=layer_idx, device=device, dtype=dtype,
        )  # fmt: skip
        self.learnable_init_states = learnable_init_states
        if learnable_init_states:
            shape = self.nheads, headdim, d_state
            self.init_states = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            self.init_states._no_weight_decay = True

    def forward(self, u, seq_idx=None):
        """u (B, L, M) -> the same; see Mamba2's."""
        state = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        return super().forward(u, seq_idx=seq_idx, initial_states=None if state is None else (None, state))


class Block(nn.Module):
    """Add, norm, mixer; with an MLP, add, norm, MLP as well. Takes and returns (the last branch's output, the residual
    that it is not added to yet)."""

    def __init__(self, dim, mixer_cls, mlp_cls, norm_cls=nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise ValueError(f"Block: fused_add_norm takes LayerNorm or RMSNorm, got {type(self.norm).__name__}")

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        how = self.fused_add_norm, self.residual_in_fp32
        hidden_states, residual = add_norm(self.norm, hidden_states, residual, *how)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(self.norm2, hidden_states, residual, *how)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
