"""Defects that a kernel could have, made out of a sound one: by other arguments, or by a change of what it returns.

test_contract.py lets each of them loose on a backend's kernel and holds the contract's own comparison to seeing it.
"""

import dataclasses
from collections.abc import Callable

from mutants import cross_scan, fft_conv, quant_matmul, selective_scan, sparse_attention
from mutants.defects import NotHere
from scalekern import _dispatch, _library

__all__ = ["MUTANTS", "Mutant", "NotHere", "inject"]


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
    monkeypatch.setattr(_dispatch, "allows", lambda name: False)  # no call leaves the walk out
    return spoiled


TABLES = [
    *((seen_by, "", table) for family in (selective_scan, fft_conv, sparse_attention, quant_matmul)
      for seen_by, table in (("forward", family.FORWARD), ("gradients", family.GRADIENTS))),
    ("forward", "", cross_scan.FORWARD),
    *(("gradients", op, table) for op, table in cross_scan.GRADIENTS.items()),
    ("forward", "hstu_attention", sparse_attention.HSTU_FORWARD),
    ("gradients", "hstu_attention", sparse_attention.HSTU_GRADIENTS),
]
MUTANTS = [
    Mutant(op, name, defect, seen_by, through)
    for seen_by, through, table in TABLES
    for op, defects in table.items()
    for name, defect in defects.items()
]
