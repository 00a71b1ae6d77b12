"""Defects of low-bit products and of the transforms around them."""

import torch
from mutants.defects import (
    NotHere,
    first_end_moved,
    flipped,
    given,
    groups_left_out,
    halved,
    ignored,
    output,
    state,
    swapped,
    zeroed,
)

from scalekern.reference.hadamard_transform import MATRICES



def part_changed(number, change):
    """Of a projection as quantized_mamba_update takes it, one part is another."""

    def changed(parts):
        if parts[number] is None:
            raise NotHere
        return tuple(change(p) if i == number else p for i, p in enumerate(parts))

    return changed


def not_rounded(kind):
    if not kind:
        raise NotHere
    return ""


FORWARD = {
    "hadamard_transform_fwd": {
        "two rows swapped": output(0, swapped(0)),
        "last point not computed": output(0, zeroed(-1, -1)),
        "last point not read": given(x=zeroed(-1, -1)),
        "Sylvester's matrix in H_m's place": given(order=lambda m: 1),
        "the other package's matrices": given(matrices=lambda name: "quarot" if name[0] == "f" else MATRICES[0]),
        "scale left out": given(scale=lambda s: 1.0),
        **flipped("transposed"),
    },
    "fused_hadamard_quantize": {
        "two rows swapped": output(0, swapped(0)),
        "last point not read": given(x=zeroed(-1, -1)),
        "scales of the other row": output(1, swapped(0)),
        "one bit more": given(bits=lambda b: b + 1),
        "truncated instead of rounded": output(0, lambda q: q - q.sign()),
        "groups left out": groups_left_out,
    },
    "quant_matmul_fwd": {
        "two tokens swapped": output(0, swapped(0)),
        "last output not computed": output(0, zeroed(-1, -1)),
        "first output of a tile not computed": output(0, zeroed(-1, 64)),
        "last input ignored": given(x=zeroed(-1, -1)),
        "first input behind a block ignored": given(x=zeroed(-1, 64)),
        "first input of the second group in the first": given(group_size=lambda size: size + 1),
        "codes of two rows swapped": given(data=swapped(0)),
        "scales of two rows swapped": given(scales=swapped(0)),
        "nibbles swapped": given(data=lambda b: b >> 4 | b << 4),
        "zeros off by one": given(zeros=lambda z: z + 1),
        "an expert's last token given to the next": given(offs=first_end_moved),
        "activations not rounded": given(activation=lambda kind: ""),
        **ignored("bias", "offsets"),
        **{"outer ignored": given(outer=torch.ones_like)},
    },
    "quantized_mamba_update": {
        "two rows swapped": output(0, swapped(0)),
        "last output not computed": output(0, zeroed(-1, -1)),
        "last input ignored": given(hidden_states=zeroed(-1, -1)),
        "conv_state stands still": state("conv_state", lambda before, after: before),
        "ssm_state stands still": state("ssm_state", lambda before, after: before),
        "activations not rounded": given(activation=not_rounded),
        "codes of two rows of in_proj swapped": given(in_proj=part_changed(0, swapped(0))),
        "scales of two rows of x_proj swapped": given(x_proj=part_changed(1, swapped(0))),
        "two rows of delta_proj swapped": given(delta_proj=part_changed(0, swapped(0))),
        "zeros of out_proj off by one": given(out_proj=part_changed(2, lambda z: z + 1)),
        "bias of in_proj ignored": given(in_proj=part_changed(6, torch.zeros_like)),
        "out_proj not rotated": given(out_proj=part_changed(7, lambda signs: None)),
        "signs of x_proj ignored": given(x_proj=part_changed(7, torch.ones_like)),
        "step size not rotated": given(delta_proj=part_changed(7, lambda signs: None)),
        **ignored("conv1d_bias", "D", "delta_bias"),
    },
    "fake_quantize_fwd": {
        "two rows swapped": output(0, swapped(0)),
        "last column not computed": output(0, zeroed(-1, -1)),
        "zeros off by one": given(zero=lambda z: z + 1),
        "steps of two rows swapped": given(scale=swapped(0)),
        "range a bit too wide": given(bits=lambda bits: bits + 1),
        "first of the second group in the first": given(group_size=lambda size: size if size is None else size + 1),
    },
}

GRADIENTS = {
    "hadamard_transform_fwd": {
        "H in its transpose's place": given(transposed=lambda value: False),
        "last point of dx not computed": output(0, zeroed(-1, -1)),
    },
    "quant_matmul_bwd": {
        "two tokens of dx swapped": output(0, swapped(0)),
        "last column of dx not computed": output(0, zeroed(-1, -1)),
        "first column of a tile of dx not computed": output(0, zeroed(-1, 64)),
        "last output ignored": given(dout=zeroed(-1, -1)),
        "first output behind a block ignored": given(dout=zeroed(-1, 64)),
        "scales of two rows swapped": given(scales=swapped(0)),
        "half of dbias's terms lost": output(5, halved),
        "zeros off by one": given(zeros=lambda z: z + 1),
        **ignored("offsets"),
        **{"outer ignored": given(outer=torch.ones_like)},
    },
    "fake_quantize_bwd": {
        "no range: dx beyond it too": output(0, lambda dx: torch.where(dx == 0, 1.0, dx)),
        "last column of dx not computed": output(0, zeroed(-1, -1)),
        "half of dscale's terms lost": output(1, halved),
        "half of dzero's terms lost": output(2, halved),
        "gradient factor ignored": given(grad_factor=lambda g: 1.0),
        "zeros off by one": given(zero=lambda z: z + 1),
    },
}
