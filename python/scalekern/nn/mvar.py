"""M-VAR's block: attention within a scale, Mamba from scale to scale, under adaptive layer norms.

Shape letters: B batch, L tokens of all scales, C width (embed_dim), D width of the condition, H heads, S scales.

Parameter names and shapes are those of OliverRensu/MVAR's models/basic_mvar.py, AdaLNSelfAttn, so its checkpoints load:

    attn.*, ffn.*, ada_lin.1    as in nn.VARBlock, but with nine modulations: D to 9 C, or ada_gss (1, 1, 9, C)
    mamba.*                     as in nn.Mamba2, 64 states

Upstream's buffer attn.patch_nums, the scales' sizes, is left out: here the mask says them. Where upstream's generation
keeps every scale's tokens and scans all of them again at each scale, the state is carried: the same output for the work
of one pass. Upstream's shared_aln has six modulations where nine are read; here nine.

Source: Ren et al., M-VAR: Decoupled Scale-wise Autoregressive Modeling for High-Quality Image Generation, 2024,
section 3.
"""

from scalekern.nn._attention import modulate
from scalekern.nn.mamba2 import Mamba2
from scalekern.nn.var import VARBlock


class StateCache:
    """The states of a recurrence after the tokens so far, None before the first; gradients flow through them."""

    states = None


class MVARBlock(VARBlock):
    """Maps (B, L, C) to (B, L, C) under a condition: attention within each scale, Mamba-2 over all, then an MLP.

    Args:
        embed_dim, num_heads, cond_dim, mlp_ratio, shared_aln, attn_l2_norm, drop, drop_path, norm_eps: as nn.VARBlock.
        d_state, d_conv, expand, headdim: of the nn.Mamba2.

    Raises:
        ValueError: heads that do not divide C, a headdim that does not divide expand C.

    Source: Ren et al., M-VAR, 2024, section 3.
    """

    NAME, BRANCHES = "nn.MVARBlock", 3

    def __init__(
        self, embed_dim, num_heads, cond_dim=None, mlp_ratio=4.0, shared_aln=False, attn_l2_norm=True, drop=0.0,
        drop_path=0.0, norm_eps=1e-6, d_state=64, d_conv=4, expand=2, headdim=64, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(
            embed_dim, num_heads, cond_dim, mlp_ratio, shared_aln, attn_l2_norm, drop, drop_path, norm_eps,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.mamba = Mamba2(embed_dim, d_state, d_conv, expand=expand, headdim=headdim, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_without_patch_nums)

    def new_cache(self):
        """What `forward` takes as its cache before the first scale; its size does not grow with the scales."""
        return StateCache()

    def forward(self, x, cond, mask=None, *, cache=None):
        """All scales at once, to train, or the next ones, to infer.

        Args:
            x: (B, L, C).
            cond: (B, D); with shared_aln the nine modulations (B, 1, 9, C).
            mask: which of the L tokens see each other, for several scales
                `masks.segments(cu_seqlens=torch.tensor([0, *scale_ends(sizes)]))`, made once and given to all blocks.
                None: all, which is right for one scale at a time.
            cache: of `new_cache`, holds the state after the scales so far and moves on.

        Returns:
            (B, L, C).

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        gamma1, gamma2, gamma3, scale1, scale2, scale3, shift1, shift2, shift3 = self._modulations(x, cond)
        x = x + self.drop_path(gamma1 * self.attn(modulate(self.ln_wo_grad(x), shift1, scale1), mask))
        y = modulate(self.ln_wo_grad(x), shift2, scale2)
        if cache is None:
            y = self.mamba(y)
        else:
            y, cache.states = self.mamba(y, initial_states=cache.states, return_final_states=True)
        x = x + self.drop_path(gamma2 * y)
        return x + self.drop_path(gamma3 * self.ffn(modulate(self.ln_wo_grad(x), shift3, scale3)))


def _without_patch_nums(module, state_dict, prefix, *rest):
    state_dict.pop(f"{prefix}attn.patch_nums", None)
