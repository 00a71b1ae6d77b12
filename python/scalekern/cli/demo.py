"""`python -m scalekern demo`: the command line of scalekern._demo."""

import pathlib


def add_arguments(parser) -> None:
    parser.add_argument("--text", type=pathlib.Path, metavar="FILE", help="training text (default: Python's library)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps")
    parser.add_argument("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of checkpoints, text and figure")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")


def main(args) -> int:
    from scalekern import _demo

    return _demo.main(args)
