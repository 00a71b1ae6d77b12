"""What plans of launches count with. Triton's own unwrap constexprs for the compiler, 1.5 us a call; a plan makes ten."""


def cdiv(n: int, d: int) -> int:
    return -(n // -d)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0
