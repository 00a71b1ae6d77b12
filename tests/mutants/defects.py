"""Kinds of defects, out of which the tables of each family are made: each is defect(run, args) of a Mutant."""

import torch


class NotHere(Exception):
    """Comes out of a call that has nothing which the defect could spoil."""


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


def averaged(x):
    """One number for all."""
    return x.mean().expand_as(x)


def shifted(axis, by=1):
    return lambda x: x.roll(by, axis)


def nibbles_swapped(data):
    """Of caches of 4-bit codes; of others, channels."""
    return (data << 4 | data >> 4 & 15) if data.dtype == torch.int8 else data.flip(-1)


def groups_left_out(run, args):
    """One scale for a whole row."""
    if not args["group_size"]:
        raise NotHere
    q, scales = run({**args, "group_size": 0})
    return q, scales.expand(*q.shape[:-1], q.shape[-1] // args["group_size"]).contiguous()


def no_gate(z):
    return torch.full_like(z, 1.2784645)  # silu is 1 here


def first_end_moved(offs):
    offs = offs.clone()
    offs[0] -= 1
    return offs


def boundary_moved(cu):
    cu = cu.clone()
    cu[1] += 1
    return cu


def ones_for_none(dt, A):
    if dt is not None:
        raise NotHere
    return A.real.new_ones(A.shape[0])
