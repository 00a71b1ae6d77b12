"""H3: two state space models between gates; the first one shifts, so that a token can be compared with earlier ones.

Shape letters: B batch, L length, M model width (d_model), P width of a head (head_dim), H heads (M / P), N states.

Parameter names and shapes are those of HazyResearch/H3's src/models/ssm/h3.py, so its checkpoints load:

    q_proj, k_proj, v_proj, output_linear  Linear: M to M
    ssm_k_kernel.kernel.B, .C              (M, N) and (1, M, N): the shift model
    ssm_k_D, D                             (M,) and (H,): what passes the models by
    kernel.kernel.log_dt                   (H,): the diagonal model
    kernel.kernel.inv_A_real, .A_imag      (S, N / 2), -Re(A) as a logarithm; S = n_ssm copies, head h uses h % S
    kernel.kernel.B, .C                    (S, N / 2, 2) and (1, H, N / 2, 2)

Channel h P + p of the projections is feature p of head h, in the output too: with P > 1 this is the order of upstream's
fused kernel and of its reference, which its plain path and its decoding step have the other way round.

Source: Fu et al., Hungry Hungry Hippos: Towards Language Modeling with State Space Models, 2023, section 3.
"""

import functools

import torch
from torch import nn

from scalekern import _checks, _dispatch, _library
from scalekern.nn import _ssm_kernels as kernels
from scalekern.nn._optim import register
from scalekern.nn.quant_linear import products
from scalekern.ops.fft_conv import fft_conv

NAME = "nn.H3"


class ShiftKernel(nn.Module):
    """x_t[n] = x_{t-1}[n - 1] + B[n] u_t, y_t = C x_t: N taps, k[l] = sum_n B[n] C[n + l]."""

    def __init__(self, d_model, N, lr=None, device=None, dtype=None):
        super().__init__()
        B = torch.zeros(d_model, N, device=device, dtype=dtype)
        B[:, 0] = 1
        register(self, "B", B, lr)
        C = torch.empty(d_model, 1, N, device=device, dtype=dtype)
        bound = N**-0.5  # torch.nn.Conv1d's
        self.C = nn.Parameter(C.uniform_(-bound, bound).transpose(0, 1).contiguous())

    def forward(self):
        """k (M, N)."""
        size = 2 * self.B.shape[1]
        B, C = (torch.fft.rfft(kernels.widened(x), n=size) for x in (self.B, self.C[0]))
        return torch.fft.irfft(B.conj() * C, n=size)[:, : self.B.shape[1]]


class SSMKernelDiag(kernels.DiagKernel):
    """The diagonal model of one channel a head, bilinear."""

    disc = "bilinear"

    def __init__(self, heads, N, measure, dt_min, dt_max, n_ssm, lr, device=None, dtype=None):
        super().__init__()
        factory, copies = {"device": device, "dtype": dtype}, heads if n_ssm is None else n_ssm
        _checks.at_least(NAME, "n_ssm", copies, 1)
        if heads % copies:
            raise ValueError(f"{NAME}: n_ssm must divide the number of heads, {heads}, got {copies}")
        A, _, B = kernels.initial(measure, N)
        C = torch.view_as_complex(torch.randn(1, heads, N // 2, 2, dtype=torch.float64)) / 2**0.5
        self.C = nn.Parameter(kernels.as_pairs(C * B, factory))
        register(self, "log_dt", kernels.log_uniform(dt_min, dt_max, heads, **factory), lr)
        register(self, "B", kernels.as_pairs(B.expand(copies, -1), factory), lr)
        real = (-A.real).clamp(min=kernels.MIN_DECAY).log()
        register(self, "inv_A_real", real.expand(copies, -1).to(**factory, copy=True), lr)
        register(self, "A_imag", A.imag.expand(copies, -1).to(**factory, copy=True), lr)

    def ssm(self):
        A = torch.complex(-kernels.widened(self.inv_A_real).exp(), kernels.widened(self.A_imag))
        C = kernels.as_complex(self.C)[0]
        return (
            kernels.tile(A, len(C)),
            kernels.tile(kernels.as_complex(self.B), len(C)),
            C,
            kernels.widened(self.log_dt).exp(),
        )


class _Named(nn.Module):
    """A kernel under the name that upstream's checkpoints have for it, `kernel`."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, *args):
        return self.kernel(*args)


_native = _dispatch.native("h3_advance", "cpu")
_here = functools.cache(lambda: _dispatch.Backend("cpu", _native).unavailable("cpu") is None)


def _is_native(q, k, v, shift_state, ssm_state, backwards, a, b, c, D) -> bool:
    """Whether the native token, half of the time of torch's calls, takes these: plain float32, contiguous."""
    reals = q, k, v, shift_state, backwards, D
    return (
        q.is_cpu and not torch.is_grad_enabled() and _library.is_plain((q, shift_state, ssm_state))
        and _dispatch.allows("cpu") and _here()
        and ssm_state.dtype == torch.complex64 and all([x.dtype == torch.float32 for x in reals])
        and ssm_state.shape == (len(q), *a.shape) and shift_state.shape[:2] == q.shape and q.numel() > 0
        and backwards.shape[1] <= shift_state.shape[2] + 1 and shift_state.is_cpu and ssm_state.is_cpu
        and all([x.is_contiguous() for x in (*reals, ssm_state, a, b, c)]) and not ssm_state.is_conj()
    )  # fmt: skip


class H3(nn.Module):
    """Maps (B, L, M) to (B, L, M): q (diagonal SSM (shift SSM (k) v)), projected; k v^T in every head.

    Args:
        d_model: M.   d_state: N, even.   l_max: the most taps of a kernel; None for as many as tokens. With states the
            diagonal model is a recurrence, which no l_max cuts off.
        head_dim: P, which divides M.   layer_idx: the key of this layer's states in
            `inference_params.key_value_memory_dict`.
        measure: "diag-lin", "diag-inv" or "diag-legs", the initial A.   dt_min, dt_max: the initial step sizes lie
            between them.   n_ssm: S.   lr: a mark for an optimizer, see nn._optim; 0 makes A, B and dt buffers.

    Raises:
        ValueError: a head_dim that does not divide d_model, an n_ssm that does not divide the heads.
    """

    def __init__(
        self, d_model, d_state=64, l_max=None, head_dim=1, layer_idx=None, device=None, dtype=None,
        measure="diag-lin", dt_min=0.001, dt_max=0.1, n_ssm=None, lr=None,
    ):  # fmt: skip
        super().__init__()
        _checks.choice(NAME, "measure", measure, ("diag-lin", "diag-inv", "diag-legs"))
        _checks.at_least(NAME, "d_model", d_model, 1)
        _checks.size_or_none(NAME, "l_max", l_max)
        kernels.check_states(NAME, d_state)
        _checks.at_least(NAME, "head_dim", head_dim, 1)
        if d_model % head_dim:
            raise ValueError(f"{NAME}: head_dim must divide d_model = {d_model}, got {head_dim}")
        factory, wide = {"device": device, "dtype": dtype}, {"device": device, "dtype": kernels.real_dtype(dtype)}
        heads = d_model // head_dim
        self.d_model, self.d_state, self.l_max, self.head_dim = d_model, d_state, l_max, head_dim
        self.layer_idx = layer_idx
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, **factory) for _ in "qkv")
        self.ssm_k_kernel = _Named(ShiftKernel(d_model, d_state, lr, **wide))
        self.ssm_k_D = nn.Parameter(torch.randn(d_model, **wide))
        self.kernel = _Named(SSMKernelDiag(heads, d_state, measure, dt_min, dt_max, n_ssm, lr, **wide))
        self.D = nn.Parameter(torch.randn(heads, **factory))
        self.output_linear = nn.Linear(d_model, d_model, **factory)

    def forward(
        self, u, inference_params=None, *, mask=None, initial_states=None, return_final_states=False, discretized=None
    ):  # fmt: skip
        """Run a whole sequence, or its next tokens.

        Args:
            u: (B, L, M).
            inference_params: as upstream, an object with `key_value_memory_dict` and `sequence_len_offset` (or, as
                Mamba's, `seqlen_offset`): this layer's states live there and are updated in place. At offset 0 they
                are started afresh.
            mask: (B, L), zero or False where a row is padded: a row then gives what it gives alone.
            initial_states: (shift_state, ssm_state) as `allocate_inference_cache` lays them out. Not changed;
                gradients flow into them.
            return_final_states: also return the (shift_state, ssm_state) after the last token.
            discretized: `discretize()`, which then is not computed anew: what decoding should pass.

        Returns:
            (B, L, M), or ((B, L, M), (shift_state, ssm_state)).
        """
        _checks.tensor(NAME, "u", u, dims=3, dtypes=_checks.taken_by(self.q_proj))
        _checks.shape(NAME, "u", u, (None, None, self.d_model))
        if inference_params is not None:
            if initial_states is not None or return_final_states:
                raise ValueError(f"{NAME}: inference_params holds the states: no initial or final states")
            return self._forward_cached(u, inference_params, mask)
        _checks.padding(NAME, mask, u, *u.shape[:2])
        if initial_states is not None:
            self._check_states(initial_states, len(u))
        projections = products(u, self.q_proj, self.k_proj, self.v_proj)
        if u.shape[1] == 1 and initial_states is not None and return_final_states and mask is None:
            y, states = self._advance(*[x.squeeze(1) for x in projections], *initial_states, discretized)
            return self.output_linear(y.unsqueeze(1)), states
        q, k, v = (x.transpose(1, 2) for x in projections)
        if mask is not None:
            k, v = (x.masked_fill((mask == 0)[:, None], 0) for x in (k, v))
        if initial_states is None and not return_final_states:
            y, states = self._convolve(q, k, v), None
        else:
            zeros = initial_states is None
            states = self.allocate_inference_cache(len(u), dtype=k.dtype) if zeros else initial_states
            y, states = self._recur(q, k, v, *states, discretized)
        out = self.output_linear(y.transpose(1, 2))
        return (out, states) if return_final_states else out

    def _check_states(self, states, batch):
        if not isinstance(states, (tuple, list)) or len(states) != 2:
            raise TypeError(f"{NAME}: initial_states must be (shift_state, ssm_state), got {states!r}")
        size, (shift, ssm) = self.head_dim, states
        _checks.tensor(NAME, "initial_states[0]", shift, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "initial_states[0]", shift, (batch, self.d_model, self.d_state - 1))
        _checks.tensor(NAME, "initial_states[1]", ssm, dims=3, dtypes=_checks.COMPLEX)
        _checks.shape(NAME, "initial_states[1]", ssm, (batch * size * size, self.d_model // size, self.d_state // 2))

    def _taps(self):
        taps = self.ssm_k_kernel()
        return taps if self.l_max is None else taps[:, : self.l_max]

    def _convolve(self, q, k, v):
        length = k.shape[-1]
        kernel = self.kernel(max(1, length if self.l_max is None else min(length, self.l_max)))[0]
        k = fft_conv(k, self._taps(), skip=self.ssm_k_D)
        if self.head_dim == 1:  # both gates inside the convolution
            return fft_conv(v, kernel, skip=self.D, pregate=k, postgate=q)
        return self._read(q, fft_conv(self._outer(k, v), kernel, skip=self.D))

    def _recur(self, q, k, v, shift_state, ssm_state, discretized):
        """The same from states to states."""
        taps, coefficients = (self._taps(), None) if discretized is None else discretized[:2]
        window = torch.cat([shift_state.to(k.dtype), k], -1)
        past = shift_state.shape[-1]
        k = fft_conv(window, taps, skip=self.ssm_k_D)[..., past:]
        y, ssm_state = self.kernel.kernel.scan(self._outer(k, v), self.D, ssm_state, coefficients)
        shift_state = window[..., window.shape[-1] - past :].to(shift_state.dtype)
        return self._read(q, y), (shift_state, ssm_state)

    def _advance(self, q, k, v, shift_state, ssm_state, discretized):
        """One token (B, M), as _recur: the shift model is a dot product with the last N, and every call counts."""
        _, coefficients, backwards = self.discretize() if discretized is None else discretized
        # After a prompt the states are views.
        given = q, k, v, shift_state.contiguous(), ssm_state.contiguous(), backwards, *coefficients[:3], self.D
        if self.head_dim == 1 and _is_native(*given):
            y, *states = _native(*given)
            return y, tuple(states)
        window = torch.cat([shift_state.to(k.dtype), k.unsqueeze(-1)], -1)
        past, taps = shift_state.shape[-1], backwards.shape[-1]
        near = window.narrow(-1, past + 1 - taps, taps)  # an index with an ellipsis takes 4 us, this 1
        k = torch.linalg.vecdot(near.to(backwards.dtype), backwards).to(k.dtype)
        q, k, v = [x.unsqueeze(-1) for x in (q, k, v)]
        y, ssm_state = self.kernel.kernel.scan(self._outer(k, v), self.D, ssm_state, coefficients)
        return self._read(q, y).squeeze(-1), (window.narrow(-1, 1, past).to(shift_state.dtype), ssm_state)

    def _outer(self, k, v):
        """k v^T in every head, (B P P, H, L)."""
        if self.head_dim == 1:
            return k * v
        k, v = (x.unflatten(1, (-1, self.head_dim)).transpose(1, 2) for x in (k, v))  # [B, P, H, L]
        return (k[:, :, None] * v[:, None]).flatten(0, 2)

    def _read(self, q, y):
        """q^T y in every head, (B, M, L)."""
        if self.head_dim == 1:
            return q * y
        size = self.head_dim
        q = q.unflatten(1, (-1, size)).transpose(1, 2)
        y = (q[:, :, None] * y.unflatten(0, (len(q), size, size))).sum(1)  # [B, P, H, L]
        return y.transpose(1, 2).flatten(1, 2)

    def _forward_cached(self, u, params, mask):
        if self.layer_idx is None:
            raise ValueError(f"{NAME}: inference_params need a layer_idx, which this layer was built without")
        offset = params.sequence_len_offset if hasattr(params, "sequence_len_offset") else params.seqlen_offset
        cache = params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(len(u))
        if offset and mask is not None:
            raise ValueError(f"{NAME}: mask pads the beginning of a sequence, but the offset is past it")
        states = cache[self.layer_idx] if offset else None
        out, after = self.forward(u, mask=mask, initial_states=states, return_final_states=True)
        with torch.no_grad():
            for state, new in zip(cache[self.layer_idx], after):
                state.copy_(new)
        return out

    def step(self, u, states, discretized=None):
        """One token: u (B, 1, M) -> (out (B, 1, M), states); see `forward`."""
        _checks.tensor(NAME, "u", u, dims=3, dtypes=_checks.FLOATING)
        _checks.shape(NAME, "u", u, (None, 1, self.d_model))
        return self.forward(u, initial_states=states, return_final_states=True, discretized=discretized)

    def discretize(self):
        """What a step takes of both models' parameters: (the shift model's taps, the diagonal model's coefficients,
        those taps from the last to the first, which takes D)."""
        taps = self._taps()
        first = taps[:, :1] + self.ssm_k_D[:, None]
        return taps, self.kernel.kernel.discretize(), torch.cat([taps[:, 1:].flip(-1), first], -1)

    def allocate_inference_cache(self, batch_size, max_seqlen=None, dtype=None):
        """Zero states: shift_state (B, M, N - 1), the last inputs of the shift model, in `dtype` (default: k_proj's),
        and ssm_state (B P P, H, N / 2), complex. The size does not depend on `max_seqlen`."""
        weight, C = self.k_proj.weight, kernels.as_complex(self.kernel.kernel.C)
        shift = weight.new_zeros(batch_size, self.d_model, self.d_state - 1, dtype=dtype or weight.dtype)
        return shift, C.new_zeros(batch_size * self.head_dim**2, *C.shape[1:])
