"""What S4D, S4, DSS and H3 have in common: modules that hold a state space model and make its convolution kernel.

Shape letters: B batch, L length, H heads, N states (halves of conjugate pairs), S copies of (A, B), C channels (kernels
a head), R rank, T tokens of a chunk.

Complex parameters are pairs of reals in a last axis of 2. Head h uses copy h % S.
"""

import math

import torch
from torch import nn

from scalekern import _checks
from scalekern.nn._optim import register
from scalekern.nn.ssm_init import MEASURES, S4D, nplr, s4d
from scalekern.ops.diag_ssm import diag_ssm, diag_ssm_discretize
from scalekern.ops.diag_ssm_kernel import diag_ssm_kernel
from scalekern.ops.dplr_ssm_kernel import dplr_ssm_kernel
from scalekern.reference._complex import conj, wide
from scalekern.reference.diag_ssm import DSS_EPSILON, scale
from scalekern.reference.dplr_ssm import truncate_C

CHUNK = 64  # tokens of a low-rank model's scan that one product of matrices takes
MIN_DECAY = 1e-4  # -Re(A) at least, initially


def real_dtype(dtype):
    """That of the parameters of a state space model: bfloat16 has no complex counterpart, nor digits for a power."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_complex(pairs):
    return torch.view_as_complex(pairs if pairs.dtype == torch.float64 else pairs.float())


def as_pairs(x, factory):
    return torch.view_as_real(x.resolve_conj()).to(**factory).contiguous()


def check_states(name, d_state):
    if not isinstance(d_state, int) or d_state < 2 or d_state % 2:
        raise ValueError(f"{name}: d_state must be even and positive, got {d_state!r}")


def log_uniform(low, high, *shape, **factory):
    """Step sizes between dt_min and dt_max, as logarithms."""
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 < low <= high):
        raise ValueError(f"log_uniform: dt_min must be positive and at most dt_max, got {low!r} and {high!r}")
    return torch.rand(*shape, **factory) * (math.log(high) - math.log(low)) + math.log(low)


def tile(x, count):
    """(.., S, N) to (.., count, N)."""
    return x.repeat(*[1] * (x.dim() - 2), count // x.shape[-2], 1)


class DiagKernel(nn.Module):
    """A diagonal model: `ssm()` gives (A, B, C, dt), each channel of a head a model of its own, (C H, N) and (C H,)."""

    channels, disc, conjugate_pairs = 1, "zoh", True

    def ssm(self):
        raise NotImplementedError

    def forward(self, L):
        """K (C, H, L)."""
        K = diag_ssm_kernel(*self.ssm(), L, self.disc, conjugate_pairs=self.conjugate_pairs)
        return K.unflatten(0, (self.channels, -1))

    def discretize(self):
        """(a, b, s C, None), in the places of `ssm`: what `scan` needs and does not change with the tokens."""
        self._check_states()
        A, B, C, dt = self.ssm()
        return *diag_ssm_discretize(A, B, dt, self.disc), scale(A, self.conjugate_pairs) * wide(C), None

    def _check_states(self):
        if self.disc == "dss":
            raise ValueError(f"{type(self).__name__}: disc 'dss' has no states: its kernel depends on its length")

    def scan(self, u, D, state, discretized=None):
        """(y (B, C H, L), state after it (B, C H, N)) from u (B, C H, L), D (C H,) and a state, or None for zeros."""
        self._check_states()
        A, B, C, dt = self.ssm() if discretized is None else discretized
        return diag_ssm(
            u, A, B, C, D, dt, initial_state=state, return_last_state=True, disc=self.disc,
            conjugate_pairs=self.conjugate_pairs and discretized is None,
        )  # fmt: skip


class S4DKernel(DiagKernel):
    """C (H, N, 2), log_dt (H,), log_A_real and A_imag (H, N); B is 1."""

    def __init__(self, d_model, N=64, dt_min=0.001, dt_max=0.1, lr=None, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": real_dtype(dtype)}
        check_states("nn.S4D", N)
        A = s4d("lin", N).expand(d_model, -1)
        # Re and Im of a complex normal number have variance 1/2 each.
        self.C = nn.Parameter(torch.randn(d_model, N // 2, 2, **factory) / 2**0.5)
        register(self, "log_dt", log_uniform(dt_min, dt_max, d_model, **factory), lr)
        register(self, "log_A_real", (-A.real).log().to(**factory), lr)
        register(self, "A_imag", A.imag.to(**factory, copy=True), lr)

    def ssm(self):
        A, C = torch.complex(-widened(self.log_A_real).exp(), widened(self.A_imag)), as_complex(self.C)
        return A, torch.ones_like(C), C, widened(self.log_dt).exp()


def widened(x):
    return x if x.dtype == torch.float64 else x.float()


def initial(init, N, rank=1):
    """(A (N / 2,), P (rank, N / 2), B (N / 2,)), Im A >= 0, of a HiPPO measure or of "diag-" and a name of S4D's."""
    _checks.choice("initial", "init", init, (*MEASURES, *(f"diag-{name}" for name in S4D)))
    _checks.at_least("initial", "rank", rank, 1)
    if init.startswith("diag-"):
        A = s4d(init.removeprefix("diag-"), N)
        B = nplr("legs", N)[2] if init == "diag-legs" else torch.ones_like(A)
        return A, A.new_zeros(rank, N // 2), B
    A, P, B, _ = nplr(init, N)
    if rank < len(P):
        raise ValueError(f"init: {init!r} needs a rank of at least {len(P)}, got {rank}")
    return A, torch.cat([P, P.new_zeros(rank - len(P), N // 2)]), B


class SSMKernelDiag(DiagKernel):
    """inv_dt (H, 1), A_real and A_imag (S, N), B (1, S, N, 2), C (C, H, N, 2): A = -exp(A_real) - i A_imag."""

    low_rank = False

    def __init__(
        self, d_model, d_state=64, channels=1, init="diag-lin", disc="zoh", dt_min=0.001, dt_max=0.1, n_ssm=None,
        rank=1, lr=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        name = type(self).__name__
        check_states(name, d_state)
        copies = d_model if n_ssm is None else n_ssm
        _checks.at_least(name, "n_ssm", copies, 1)
        if d_model % copies:
            raise ValueError(f"{name}: n_ssm must divide d_model = {d_model}, got {copies}")
        factory = {"device": device, "dtype": real_dtype(dtype)}
        self.d_model, self.channels, self.disc = d_model, channels, disc
        A, P, B = initial(init, d_state, rank)
        # Upstream keeps the halves with Im A <= 0.
        if self.low_rank:
            register(self, "P", as_pairs(P.conj()[:, None].expand(-1, copies, -1), factory), lr)
        register(self, "inv_dt", log_uniform(dt_min, dt_max, d_model, 1, **factory), lr)
        self.C = nn.Parameter(torch.randn(channels, d_model, d_state // 2, 2, **factory) / 2**0.5)
        register(self, "B", as_pairs(B.conj().expand(1, copies, -1), factory), lr)
        register(self, "A_real", (-A.real).clamp(min=MIN_DECAY).log().expand(copies, -1).to(**factory, copy=True), lr)
        register(self, "A_imag", A.imag.expand(copies, -1).to(**factory, copy=True), lr)

    def ssm(self):
        A = torch.complex(-widened(self.A_real).exp(), -widened(self.A_imag))
        total, C = self.channels * self.d_model, as_complex(self.C).flatten(0, 1)
        A, B = (tile(x, total) for x in (A, as_complex(self.B)[0]))
        return A, B, C, widened(self.inv_dt)[:, 0].exp().repeat(self.channels)


class SSMKernelDPLR(SSMKernelDiag):
    """Those and P (R, S, N, 2), l_kernel (): A = diag(A) - sum_r P_r P_r^H, bilinear.

    Where l_kernel is not 0, C stands for C (I - a^l_kernel), which S4 trains. With an l_max it is so from the start;
    without one C stays C, any length is served, and dense powers of a are computed every time.
    """

    low_rank = True

    def __init__(self, d_model, d_state=64, channels=1, init="legs", l_max=None, **options):
        super().__init__(d_model, d_state, channels, init, disc="bilinear", **options)
        self.register_buffer("l_kernel", torch.tensor(l_max or 0, device=options.get("device")))
        self._length = l_max or 0  # l_kernel, where reading it waits for no device
        if self._length:
            with torch.no_grad():
                A, P, _, C, dt = self._parameters_of_heads()
                self.C.copy_(torch.view_as_real(truncate_C(A, P, C, dt, l_max)).unflatten(0, (channels, d_model)))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if not self.l_kernel.is_meta:
            self._length = int(self.l_kernel)

    def _parameters_of_heads(self):
        A, B, C, dt = self.ssm()
        return A, tile(as_complex(self.P), len(A)), B, C, dt

    def forward(self, L):
        """K (C, H, L). A truncated C is carried to twice its length until it serves L."""
        A, P, B, C, dt = self._parameters_of_heads()
        length = self._length
        if length and length < L:
            a = discretize_dplr(A, P, B, dt)[0]
            power = torch.linalg.matrix_power(a, length)
            while length < L:  # C (I - a^l) (I + a^l)
                paired = pair(C)
                C = (paired + (paired[:, None] @ power)[:, 0])[:, : A.shape[1]].to(C.dtype)
                power, length = power @ power, 2 * length
        K = dplr_ssm_kernel(A, P, B, C, dt, length or max(L, 1), C_is_truncated=length > 0)
        return K[:, :L].unflatten(0, (self.channels, -1))

    def discretize(self):
        """(a (C H, 2 N, 2 N), b, c (C H, 2 N)), complex128; computing these is most of the work of a token."""
        A, P, B, C, dt = self._parameters_of_heads()
        a, b = discretize_dplr(A, P, B, dt)
        c = pair(C)
        if self._length:
            eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            c = torch.linalg.solve((eye - torch.linalg.matrix_power(a, self._length)).mT, c)
        return a, b, c

    def scan(self, u, D, state, discretized=None):
        a, b, c = self.discretize() if discretized is None else discretized
        if state is not None:
            _checks.tensor("SSMKernelDPLR", "initial_state", state, dims=3, dtypes=_checks.FLOATING + _checks.COMPLEX)
            _checks.shape("SSMKernelDPLR", "initial_state", state, (len(u), len(b), b.shape[1] // 2))
        x = b.new_zeros(len(u), *b.shape) if state is None else pair(state)
        y, x = scan_dplr(u.double(), a, b, c, x)
        dtype = (real_dtype(u.dtype) if state is None else state.dtype).to_complex()
        return (y + D[:, None] * u).to(u.dtype), x[..., : x.shape[-1] // 2].to(dtype)


def pair(x):
    """(.., N) halves to (.., 2 N), complex128."""
    x = x.to(torch.complex128)
    return torch.cat([x, conj(x)], -1)


def discretize_dplr(A, P, B, dt):
    """(a, b) of the bilinear transform, dense, in complex128."""
    A, P, B, half = pair(A), pair(P), pair(B), dt.double() / 2
    dense = half[:, None, None] * (torch.diag_embed(A) - torch.einsum("rhn,rhm->hnm", P, conj(P)))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    both = torch.linalg.solve(eye - dense, torch.cat([eye + dense, (2 * half[:, None] * B)[..., None]], -1))
    return both[..., :-1], both[..., -1]


def scan_dplr(u, a, b, c, x):
    """y_t = Re(c x_t), x_t = a x_{t-1} + b u_t, chunk by chunk: (y (B, H, L), x (B, H, 2 N))."""
    size = max(1, min(CHUNK, u.shape[-1]))
    columns = krylov(a, b, size)  # [H, 2 N, T]: a^j b
    rows = krylov(a.mT, (c[:, None] @ a)[:, 0], size).mT  # [H, T, 2 N]: c a^(j + 1)
    taps = (c[:, None] @ columns)[:, 0].real  # [H, T]
    lag = torch.arange(size, device=u.device)[:, None] - torch.arange(size, device=u.device)
    local = torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0)  # [H, T, T]
    outs, done = [], None
    for piece in u.split(size, -1):
        count = piece.shape[-1]
        inside = torch.einsum("hij,bhj->bhi", local[:, :count, :count], piece)
        outs.append(inside + torch.einsum("htn,bhn->bht", rows[:, :count], x).real)
        if count != done:  # at the first chunk and a shorter last one
            power, done = torch.linalg.matrix_power(a, count), count
        added = torch.einsum("hnt,bht->bhn", columns[..., :count].flip(-1), piece.to(x.dtype))
        x = torch.einsum("hnm,bhm->bhn", power, x) + added
    return torch.cat(outs, -1), x


def krylov(a, v, count):
    """(H, N, count): v, a v, a^2 v, .., by doubling."""
    columns = v[..., None]
    while columns.shape[-1] < count:
        columns = torch.cat([columns, a @ columns], -1)
        a = a @ a
    return columns[..., :count]


class DSSKernel(DiagKernel):
    """log_dt (H, 2) or (H,), W (C, H, N, 2), and Lambda (N, 2), or for "exp" Lambda_log_neg_re and Lambda_im (N,).

    dt has a part for Re(Lambda) and one for Im(Lambda). In K, W stands before a softmax over the length, or before
    (e^{dt Lambda} - 1) / Lambda.
    """

    conjugate_pairs = False

    def __init__(
        self, d_model, d_state=64, channels=1, version="softmax", dt_min=0.001, dt_max=0.1, sep_dt_re_im=True, lr=1e-3,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least("nn.DSS", "d_state", d_state, 1)
        _checks.choice("nn.DSS", "version", version, ("softmax", "exp"))
        factory = {"device": device, "dtype": real_dtype(dtype)}
        self.channels, self.version, self.disc = channels, version, "dss" if version == "softmax" else "zoh"
        log_dt = log_uniform(dt_min, dt_max, d_model, **factory)
        Lambda = s4d("legs", 2 * d_state).flip(0)  # the largest imaginary part first, as upstream
        register(self, "log_dt", log_dt[:, None].repeat(1, 2) if sep_dt_re_im else log_dt, lr)
        if version == "softmax":
            register(self, "Lambda", as_pairs(Lambda, factory), lr)
        else:
            register(self, "Lambda_log_neg_re", (-Lambda.real).log().to(**factory), lr)
            register(self, "Lambda_im", Lambda.imag.to(**factory), lr)
        register(self, "W", torch.randn(channels, d_model, d_state, 2, **factory), lr)

    def forward(self, L):
        K = diag_ssm_kernel(*self.ssm(L), L, self.disc, conjugate_pairs=False)
        return K.unflatten(0, (self.channels, -1))

    def ssm(self, L=1):
        """(A, B, C, dt); with two step sizes the softmax's C depends, by as little as its epsilon, on the length."""
        if self.version == "softmax":
            Lambda = as_complex(self.Lambda)
        else:
            Lambda = torch.complex(-widened(self.Lambda_log_neg_re).exp(), widened(self.Lambda_im))
        dt, W = widened(self.log_dt).exp(), as_complex(self.W)
        A = Lambda.expand(len(dt), -1)
        if dt.dim() == 2:
            # dt_0 A = dt_0 Re + i dt_1 Im. W stands before 1 / Lambda, C before 1 / A; the softmax has conj(x) / (|x|^2
            # + epsilon) in place of 1 / x, with x = (e^{zL} - 1) Lambda, or A.
            A, dt = torch.complex(A.real, A.imag * (dt[:, 1:] / dt[:, :1])), dt[:, 0]
            z = dt[:, None] * A * torch.where(A.real > 0, -L, L)
            sums, epsilon = (torch.expm1(z).abs().square(), DSS_EPSILON) if self.disc == "dss" else (1, 0)
            ratio = (sums * A.abs().square() + epsilon) / (sums * Lambda.abs().square() + epsilon)
            W = W * (conj(Lambda / A) * ratio)
        A, W = A.repeat(self.channels, 1), W.flatten(0, 1)
        return A, torch.ones_like(W), W, dt.repeat(self.channels)
