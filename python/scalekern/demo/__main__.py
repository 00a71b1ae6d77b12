"""`python -m scalekern.demo`, the same as `python -m scalekern demo`."""

import argparse
import sys

from scalekern import demo

parser = argparse.ArgumentParser(prog="python -m scalekern demo", description="Train and run a byte-level Mamba.")
demo.add_arguments(parser)
sys.exit(demo.main(parser.parse_args()))
