"""python -m scalekern doctor | demo | bench | masks | tune | report"""

import argparse
import importlib
import sys

COMMANDS = {
    "doctor": "versions, what was built, which backend runs each op and why, with a self-check",
    "demo": "train a small language model on text, generate, and compare with plain PyTorch",
    "bench": "measure speed and memory, or say what has been measured",
    "masks": "draw an attention mask, and count its tiles",
    "tune": "find the fastest Triton configurations of this GPU",
    "report": "write the README's tables and figures from the records",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scalekern", description="Kernels for sequence models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    argv = sys.argv[1:] if argv is None else argv
    named = next((a for a in argv if not a.startswith("-")), None)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == named:  # only the module of the command that was asked for is imported
            module = importlib.import_module("scalekern.demo" if name == "demo" else f"scalekern.cli.{name}")
            module.add_arguments(sub)
    args = parser.parse_args(argv)
    return module.main(args) or 0


if __name__ == "__main__":
    sys.exit(main())
