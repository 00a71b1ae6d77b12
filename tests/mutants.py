"""Defects that a kernel could have, made out of a sound one: by other arguments, or by a change of what it returns.

test_contract.py lets each of them loose on a backend's kernel and holds the contract's own comparison to seeing it.
"""

import dataclasses
from collections.abc import Callable

import torch

from scalekern import _dispatch, _library
from scalekern.reference.hadamard_transform import MATRICES


class NotHere(Exception):
    """Comes out of a call that has nothing which the defect could spoil."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`defect(run, args)` stands in for the kernel of the registered op: args by name, run(args) the sound kernel."""

    op: str
    name: str
    defect: Callable
    seen_by: str = "forward"  # or "gradients"
    through: str = ""  # the public op whose samples show it, if it is not the registered op's own

    @property
    def public(self):
        return self.through or _library.OPS[self.op].public


def inject(monkeypatch, mutant: Mutant) -> list:
    """Put the defect in; the list grows with each call that it spoils, others raise NotHere."""
    select, spoiled = _dispatch.select, []
    names = [a.name for a in _library.OPS[mutant.op].overload._schema.arguments]

    def select_mutant(op, backends, device, args):
        chosen = select(op, backends, device, args)

        def run(*values):
            outputs = mutant.defect(lambda args: chosen.run(*args.values()), dict(zip(names, values)))
            spoiled.append(op)
            return outputs

        return dataclasses.replace(chosen, run=run) if op == mutant.op else chosen

    monkeypatch.setattr(_dispatch, "select", select_mutant)
    return spoiled


def _ones_for_none(dt, A):
    if dt is not None:
        raise NotHere
    return A.real.new_ones(A.shape[0])


# --- kinds of defects ---


def given(**changes):
    """The kernel computes with changed arguments; one that is absent cannot be changed."""

    def defect(run, args):
        if any(args[name] is None for name in changes):
            raise NotHere
        return run({**args, **{name: change(args[name]) for name, change in changes.items()}})

    return defect


def output(number, change):
    """The kernel returns a changed output."""

    def defect(run, args):
        outputs = run(args)
        if isinstance(outputs, torch.Tensor):
            return change(outputs)
        if outputs[number].numel() == 0:
            raise NotHere
        return type(outputs)([*outputs[:number], change(outputs[number]), *outputs[number + 1 :]])

    return defect


def state(name, change):
    """The kernel leaves something else in the argument that it changes in place: change(before, after)."""

    def defect(run, args):
        before = args[name].clone()
        out = run(args)
        args[name].copy_(change(before, args[name].clone()))
        return out

    return defect


def ignored(*names):
    return {f"{name} ignored": given(**{name: torch.zeros_like}) for name in names}


def flipped(*flags):
    return {f"{flag} flipped": given(**{flag: lambda value: not value}) for flag in flags}


def swapped(axis):
    """The first two slices trade places."""

    def change(x):
        if x.dim() <= axis or x.shape[axis] < 2:
            raise NotHere
        rest = range(2, x.shape[axis])
        return x.index_select(axis, torch.tensor([1, 0, *rest], device=x.device))

    return change


def zeroed(axis, index):
    """One slice was never computed."""

    def change(x):
        if x.dim() == 0 or x.shape[axis] <= (index if index >= 0 else -1 - index):
            raise NotHere
        x = x.clone()
        x.select(axis, index).zero_()
        return x

    return change


def halved(x):
    """Half of what is summed is lost."""
    return x * 0.5


def shifted(axis, by=1):
    return lambda x: x.roll(by, axis)


def groups_left_out(run, args):
    """One scale for a whole row."""
    if not args["group_size"]:
        raise NotHere
    q, scales = run({**args, "group_size": 0})
    return q, scales.expand(*q.shape[:-1], q.shape[-1] // args["group_size"]).contiguous()


def no_gate(z):
    return torch.full_like(z, 1.2784645)  # silu is 1 here


def boundary_moved(cu):
    cu = cu.clone()
    cu[1] += 1
    return cu


# --- of every op ---

FORWARD = {
    "selective_scan_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "last token of a tile not computed": output(0, zeroed(2, 63)),
        "last state of another row": output(1, swapped(0)),
        **ignored("D", "delta_bias", "initial_state"),
        "z ignored": given(z=no_gate),
        **flipped("delta_softplus", "reverse"),
        "two groups of B swapped": given(B=swapped(1)),
        "two groups of C swapped": given(C=swapped(1)),
        "last state's term dropped": given(C=zeroed(2, -1)),
        "sequence boundary off by one": given(cu_seqlens=boundary_moved),
    },
    "selective_state_update": {
        "two channels swapped": output(0, swapped(2)),
        "last channel not computed": output(0, zeroed(2, -1)),
        "state not written": state("state", lambda before, after: before),
        "state of another slot": state("state", lambda before, after: after.roll(1, 0)),
        **ignored("D", "dt_bias", "state"),
        "z ignored": given(z=no_gate),
        **flipped("dt_softplus"),
        "two groups of B swapped": given(B=swapped(1)),
        "two groups of C swapped": given(C=swapped(1)),
        "slots in another order": given(state_batch_indices=lambda slots: slots.flip(0)),
    },
    "causal_conv1d_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "final states shifted": output(1, shifted(2)),
        "taps shifted": given(weight=shifted(1)),
        "oldest tap dropped": given(weight=zeroed(1, 0)),
        **ignored("bias", "initial_states"),
        **flipped("silu"),
        "runs joined": given(seq_idx=lambda ids: torch.where(ids < 0, ids, 0)),
        "padding computed": given(seq_idx=lambda ids: ids.clamp(min=0)),
        "sequence boundary off by one": given(cu_seqlens=boundary_moved),
    },
    "causal_conv1d_update": {
        "two channels swapped": output(0, swapped(1)),
        "taps shifted": given(weight=shifted(1)),
        "oldest tap dropped": given(weight=zeroed(1, 0)),
        "state not written": state("conv_state", lambda before, after: before),
        "state shifted": state("conv_state", lambda before, after: after.roll(1, 2)),
        **ignored("bias", "conv_state"),
        **flipped("silu"),
        "place in the circular state off by one": given(cache_seqlens=lambda seen: seen + 1),
        "slots in another order": given(conv_state_indices=lambda slots: slots.flip(0)),
    },
    "toeplitz_conv_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "taps shifted": given(k=shifted(1)),
        "oldest tap dropped": given(k=zeroed(1, -1)),
        "two filters swapped": given(k=swapped(0)),
    },
    "depthwise_conv2d_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last column not computed": output(0, zeroed(3, -1)),
        "taps shifted": given(w=shifted(2)),
        "first row of taps dropped": given(w=zeroed(1, 0)),
        "filters flipped": given(w=lambda w: w.flip(1, 2)),
        **ignored("bias"),
    },
    "depthwise_conv_transpose2d_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last column not computed": output(0, zeroed(3, -1)),
        "filters flipped": given(w=lambda w: w.flip(1, 2)),
        **ignored("bias"),
    },
    "diag_ssm_kernel_fwd": {
        "two heads swapped": output(0, swapped(0)),
        "first tap dropped": output(0, zeroed(1, 0)),
        "taps shifted": output(0, shifted(1)),
        **flipped("conjugate_pairs"),
        "last state's term dropped": given(C=zeroed(1, -1)),
        "steps of two heads swapped": given(dt=swapped(0)),
    },
    "dplr_ssm_kernel_fwd": {
        "two heads swapped": output(0, swapped(0)),
        "taps shifted": output(0, shifted(1)),
        **ignored("P"),
        **flipped("conjugate_pairs"),
        "last state's term dropped": given(C=zeroed(1, -1)),
    },
    "diag_ssm_fwd": {
        "two heads swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "last state of another row": output(1, swapped(0)),
        **ignored("D", "initial_state"),
        **flipped("conjugate_pairs"),
        "last state's term dropped": given(C=zeroed(1, -1)),
        "discretized twice": lambda run, args: run({**args, "dt": _ones_for_none(args["dt"], args["A"])}),
    },
    "dwt2d_fwd": {
        "two channels of the details swapped": output(1, swapped(1)),
        "horizontal and vertical swapped": output(1, lambda x: x[:, :, [1, 0, 2]]),
        "last column of low not computed": output(0, zeroed(3, -1)),
    },
    "idwt2d_fwd": {
        "last column not computed": output(0, zeroed(3, -1)),
        "two channels swapped": output(0, swapped(1)),
        **ignored("low"),
    },
    "sparse_attention_fwd": {
        "two heads swapped": output(0, swapped(1)),
        "last row not computed": output(0, zeroed(2, -1)),
        "last row of a tile not computed": output(0, zeroed(2, 63)),
        "first row of a tile not computed": output(0, zeroed(2, 64)),
        "last channel not computed": output(0, zeroed(3, -1)),
        "lse of another head": output(1, swapped(1)),
        "two keys swapped": given(k=swapped(2)),
        "last key not read": given(v=zeroed(2, -1)),
        "key heads in another order": given(v=swapped(1)),
        **ignored("bias", "sinks", "position_table"),
        "distances turned round": given(q_pos=lambda at: -at),
        "cap left out": given(softcap=lambda c: 0.0 if c else 1e-2),
        **flipped("silu"),
    },
    "sparse_attention_decode": {
        "two heads swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "last channel not computed": output(0, zeroed(3, -1)),
        "lse of another head": output(1, swapped(1)),
        "newest token not seen": given(lengths=lambda n: n - 1),
        "two rows' lengths swapped": given(lengths=swapped(0)),
        "budgets of other heads": given(budgets=swapped(0)),
        "windows one too long": given(budgets=lambda b: b + 1),
        "two pages swapped": given(block_table=swapped(1)),
        "two rows' starts swapped": given(starts=swapped(0)),
        **ignored("starts"),
        "first token of the sink forgotten": given(sink=lambda n: n - 1 if n else 1),
        "cap left out": given(softcap=lambda c: 0.0 if c else 1e-2),
        **ignored("sinks"),
        "slots off by one": given(k_cache=shifted(-2)),
    },
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
    "merge_attention_fwd": {
        "two parts swapped": given(lses=swapped(0)),
        "last part dropped": given(outs=zeroed(0, -1)),
        "lse of another row": output(1, swapped(0)),
    },
    "ssd_scan_fwd": {
        "two heads swapped": output(0, swapped(2)),
        "last token not computed": output(0, zeroed(1, -1)),
        "first token of a chunk not computed": output(0, zeroed(1, 64)),
        "last state of the final states not computed": output(1, zeroed(3, -1)),
        "two sequences' states swapped": output(2, swapped(0)),
        "B of another group": given(B=swapped(2)),
        "C of another group": given(C=swapped(2)),
        "a boundary moved": given(cu_seqlens=boundary_moved),
        "sequences not told apart": given(seq_idx=torch.zeros_like),
        "gate left out": given(z=no_gate),
        "limit ignored": given(dt_max=lambda most: float("inf")),
        **ignored("D", "dt_bias", "initial_states"),
        **flipped("dt_softplus"),
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
        "activations not rounded": given(activation=lambda kind: ""),
        **ignored("bias", "offsets"),
        **{"outer ignored": given(outer=torch.ones_like)},
    },
    "fake_quantize_fwd": {
        "two rows swapped": output(0, swapped(0)),
        "last column not computed": output(0, zeroed(-1, -1)),
        "zeros off by one": given(zero=lambda z: z + 1),
        "steps of two rows swapped": given(scale=swapped(0)),
        "range a bit too wide": given(bits=lambda bits: bits + 1),
        "first of the second group in the first": given(group_size=lambda size: size if size is None else size + 1),
    },
    "mamba_inner_fwd": {
        "two rows swapped": output(0, swapped(0)),
        "last token not computed": output(0, zeroed(1, -1)),
        "x and gate swapped": given(xz=lambda xz: xz.roll(xz.shape[1] // 2, 1)),
        "taps shifted": given(conv1d_weight=shifted(1)),
        **ignored("conv1d_bias", "D", "delta_bias", "out_proj_bias"),
        **flipped("delta_softplus"),
        **{f"{name} ignored": given(**{name: torch.ones_like}) for name in ("b_rms_weight", "dt_rms_weight")},
    },
}

GRADIENTS = {
    "hadamard_transform_fwd": {
        "H in its transpose's place": given(transposed=lambda value: False),
        "last point of dx not computed": output(0, zeroed(-1, -1)),
    },
    "selective_scan_fwd": {"a checkpoint not saved": output(2, zeroed(1, 1))},
    "selective_scan_bwd": {
        "two channels of du swapped": output(0, swapped(1)),
        "last token of ddelta not computed": output(1, zeroed(2, -1)),
        "half of dA's terms lost": output(2, halved),
        "two groups of dB swapped": output(3, swapped(1)),
        "two groups of dC swapped": output(4, swapped(1)),
        "two channels of dD swapped": output(5, swapped(0)),
        "last token of dz not computed": output(6, zeroed(2, -1)),
        "two channels of ddelta_bias swapped": output(7, swapped(0)),
        "dinitial_state not computed": output(8, zeroed(0, -1)),
        **ignored("dlast_state", "D", "initial_state"),
        "z ignored": given(z=no_gate),
        **flipped("delta_softplus", "reverse"),
        "sequence boundary off by one": given(cu_seqlens=boundary_moved),
    },
    "causal_conv1d_bwd": {
        "two channels of dx swapped": output(0, swapped(1)),
        "last token of dx not computed": output(0, zeroed(2, -1)),
        "taps of dweight shifted": output(1, shifted(1)),
        "half of dweight's terms lost": output(1, halved),
        "two channels of dbias swapped": output(2, swapped(0)),
        "dinitial_states shifted": output(3, shifted(-1)),
        **ignored("dfinal_states"),
        **flipped("silu"),
        "taps shifted": given(weight=shifted(1)),
        "runs joined": given(seq_idx=lambda ids: torch.where(ids < 0, ids, 0)),
        "sequence boundary off by one": given(cu_seqlens=boundary_moved),
    },
    "sparse_attention_bwd": {
        "two heads of dq swapped": output(0, swapped(1)),
        "last row of dq not computed": output(0, zeroed(2, -1)),
        "half of dk's terms lost": output(1, halved),
        "last row of a tile of dk not computed": output(1, zeroed(2, 63)),
        "last row of dv not computed": output(2, zeroed(2, -1)),
        "half of dbias's terms lost": output(3, halved),
        "half of dsinks's terms lost": output(4, halved),
        "half of dposition_table's terms lost": output(5, halved),
        **ignored("position_table"),
        **ignored("dlse", "bias"),
        "slope of the cap left out": given(softcap=lambda c: c * 1e3),
        **flipped("silu"),
    },
    "ssd_scan_bwd": {
        "two heads of dx swapped": output(0, swapped(2)),
        "last token of ddt not computed": output(1, zeroed(1, -1)),
        "half of dA's terms lost": output(2, halved),
        "last state of dB not computed": output(3, zeroed(3, -1)),
        "first token of a chunk of dC not computed": output(4, zeroed(1, 64)),
        "half of dD's terms lost": output(5, halved),
        "two heads of dz swapped": output(6, swapped(2)),
        "half of ddt_bias's terms lost": output(7, halved),
        "dinitial_states of the last sequence not computed": output(8, zeroed(0, -1)),
        **ignored("dfinal", "dvarlen", "initial_states"),
        **flipped("dt_softplus"),
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
    "merge_attention_bwd": {
        "two parts of douts swapped": output(0, swapped(0)),
        "half of dlses' terms lost": output(1, halved),
        **ignored("dlse"),
    },
    "toeplitz_conv_bwd": {
        "two channels of du swapped": output(0, swapped(1)),
        "last token of du not computed": output(0, zeroed(2, -1)),
        "taps of dk shifted": output(1, shifted(1)),
        "half of dk's terms lost": output(1, halved),
        "taps shifted": given(k=shifted(1)),
    },
    "depthwise_conv2d_bwd": {
        "two channels of dx swapped": output(0, swapped(1)),
        "last column of dx not computed": output(0, zeroed(3, -1)),
        "taps of dw shifted": output(1, shifted(2)),
        "half of dw's terms lost": output(1, halved),
        "two channels of dbias swapped": output(2, swapped(0)),
        "filters flipped": given(w=lambda w: w.flip(1, 2)),
    },
    "depthwise_conv_transpose2d_bwd": {
        "last column of dx not computed": output(0, zeroed(3, -1)),
        "taps of dw shifted": output(1, shifted(2)),
        "two channels of dbias swapped": output(2, swapped(0)),
    },
    "diag_ssm_kernel_bwd": {
        "two heads of dA swapped": output(0, swapped(0)),
        "half of dB's terms lost": output(1, halved),
        "last state of dC not computed": output(2, zeroed(1, -1)),
        "two heads of ddt swapped": output(3, swapped(0)),
        "first tap ignored": given(dout=zeroed(1, 0)),
    },
    "dplr_ssm_kernel_bwd": {
        "two heads of dLambda swapped": output(0, swapped(0)),
        "half of dP's terms lost": output(1, halved),
        "last state of dB not computed": output(2, zeroed(1, -1)),
        "half of ddt's terms lost": output(4, halved),
        **ignored("P"),
    },
    "diag_ssm_bwd": {
        "two heads of du swapped": output(0, swapped(1)),
        "last token of du not computed": output(0, zeroed(2, -1)),
        "half of dA's terms lost": output(1, halved),
        "last state of dB not computed": output(2, zeroed(1, -1)),
        "half of dC's terms lost": output(3, halved),
        "two heads of dD swapped": output(4, swapped(0)),
        "half of ddt's terms lost": output(5, halved),
        "dinitial_state not computed": output(6, zeroed(0, -1)),
        **ignored("dlast_state", "initial_state"),
    },
    "dwt2d_bwd": {"last column not computed": output(0, zeroed(3, -1)), **ignored("dlow")},
    "idwt2d_bwd": {
        "dlow not computed": output(0, torch.zeros_like),
        "horizontal and vertical swapped": output(1, lambda x: x[:, :, [1, 0, 2]]),
    },
    "mamba_inner_bwd": {
        "two channels of dxz swapped": output(0, swapped(1)),
        "taps of dconv1d_weight shifted": output(1, shifted(1)),
        "a row of dx_proj_weight not computed": output(3, zeroed(0, -1)),
        "half of dA's terms lost": output(7, halved),
        "two channels of dD swapped": output(10, swapped(0)),
        "two states of db_rms_weight swapped": output(14, swapped(0)),
        **flipped("delta_softplus"),
    },
}

# What hstu_attention's samples alone reach.
HSTU_FORWARD = {
    "sparse_attention_fwd": {
        **ignored("time_table"),
        "time tables of other heads": given(time_table=swapped(0)),
        "buckets shifted": given(time_table=shifted(1)),
        "times of the next key": given(k_time=shifted(0)),
        "times of the next query": given(q_time=shifted(0)),
        "norm left out": given(norm=lambda n: 1.0),
    },
}

HSTU_GRADIENTS = {
    "sparse_attention_bwd": {
        **ignored("time_table"),
        "dtime_table not computed": output(6, torch.zeros_like),
        "half of dtime_table's terms lost": output(6, halved),
        "buckets of dtime_table shifted": output(6, shifted(1)),
        "two heads of dtime_table swapped": output(6, swapped(0)),
        "last bucket of dtime_table not computed": output(6, zeroed(1, -1)),
    },
}

MUTANTS = [
    Mutant(op, name, defect, seen_by, through)
    for seen_by, through, table in (
        ("forward", "", FORWARD),
        ("gradients", "", GRADIENTS),
        ("forward", "hstu_attention", HSTU_FORWARD),
        ("gradients", "hstu_attention", HSTU_GRADIENTS),
    )
    for op, defects in table.items()
    for name, defect in defects.items()
]
