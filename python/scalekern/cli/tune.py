"""`python -m scalekern tune`: search Triton configurations on this GPU and keep them in the user's cache."""


def add_arguments(parser) -> None:
    parser.add_argument("--op", help="one op only")


def main(args) -> int:
    import torch

    if not torch.cuda.is_available():
        print("tune: torch sees no CUDA device here, and a tuning made elsewhere would be a guess")
        return 1
    try:
        from scalekern.triton_kernels import tuning
    except ImportError as error:
        print(f"tune: {error} (pip install triton)")
        return 1
    return tuning.main(args)
