"""`python -m scalekern masks "causal & window(256, 0)"`: what a mask looks like and what its tiles cost."""

import argparse
import pathlib
import sys

from scalekern.cli import console


def add_arguments(parser) -> None:
    parser.add_argument("expression", help='such as "causal & (window(256, 0) | sink(4))"; see scalekern.masks')
    parser.add_argument("--length", type=_length, default=2048, metavar="L", help="queries (default 2048)")
    parser.add_argument("--kv-length", type=_length, metavar="L", help="keys, where they are not as many as queries")
    parser.add_argument("--block", type=_block, default=(128, 128), metavar="Q[xK]", help="tile (default 128)")
    parser.add_argument("--png", type=pathlib.Path, metavar="PATH", help="write the picture of the tiles as well")


def _length(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 1 << 29:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 2^29, got {text!r}")
    return int(text)


def _block(text: str) -> tuple[int, int]:
    sizes = [_length(part) for part in text.split("x")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"must be one or two integers such as 128 or 128x64, got {text!r}")
    return sizes[0], sizes[-1]


def main(args) -> int:
    from scalekern import masks

    try:
        mask = masks.parse(args.expression)
        lengths = args.length, args.kv_length or args.length
        plan = mask.plan(*lengths, args.block)
        facts = [
            ["mask", repr(mask)],
            ["queries x keys", f"{lengths[0]} x {lengths[1]}"],
            ["tile", f"{plan.block[0]} x {plan.block[1]}"],
            ["density", f"{mask.density(*lengths):.4%}"],
            ["waste", f"{mask.waste(*lengths, args.block):.3f}"],
            *[[f"{kind} tiles", str(count)] for kind, count in _tiles(plan).items()],
        ]
        tiles = [-(-n // size) for n, size in zip(lengths, args.block)]
        picture = mask.show(*lengths, block=args.block if tiles[1] <= 64 else None, color=sys.stdout.isatty())
        if args.png:
            mask.save_png(args.png, *lengths, block=args.block if max(tiles) <= 512 else None)
            facts.append(["picture", str(args.png)])
    except (TypeError, ValueError, OSError) as error:
        print(f"masks: {error}", file=sys.stderr)
        return 1
    print(f"{picture}\n\n# full  + partial  . empty\n")
    console.table("", ["what", "value"], facts)
    return 0


def _tiles(plan) -> dict[str, int]:
    full, partial, every = plan.tiles
    return {"full": full, "partial": partial, "empty": every - full - partial}
