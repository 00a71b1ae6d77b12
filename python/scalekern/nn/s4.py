"""S4D, S4 and DSS: a long convolution with the kernel of a state space model, an activation, and a mix of the features.

Shape letters: B batch, L length, H features (d_model), N states, S copies of (A, B), C channels (kernels a feature;
twice as many when bidirectional), R rank.

Parameter names and shapes are those of the upstreams, so their checkpoints load; complex numbers are a last axis of 2.

    S4D   state-spaces/s4, models/s4/s4d.py
          D (H,), kernel.C (H, N / 2, 2), kernel.log_dt (H,), kernel.log_A_real and .A_imag (H, N / 2),
          output_linear.0 a Conv1d: weight (2 H, H, 1)
    S4    state-spaces/s4, S4Block in models/s4/s4.py, with mode "dplr" or "diag"
          layer.D (C, H), layer.kernel.inv_dt (H, 1), .A_real and .A_imag (S, N / 2), .B (1, S, N / 2, 2),
          .C (C, H, N / 2, 2), output_linear.0 a Linear: C H to 2 H; with "dplr" layer.kernel.P (R, S, N / 2, 2) and
          .l_kernel ()
    DSS   ag1988/dss, src/models/sequence/ss/standalone/dss.py
          D (C, H), kernel.log_dt (H, 2) or (H,), kernel.Lambda (N, 2) (version "exp": .Lambda_log_neg_re and .Lambda_im
          (N,)), kernel.W (C, H, N, 2), output_linear.weight (H, C H) and .bias (H, 1)

Sources: Gu et al., Efficiently Modeling Long Sequences with Structured State Spaces (S4), 2022, section 3; Gu et al.,
On the Parameterization and Initialization of Diagonal State Space Models (S4D), 2022, sections 3 and 4; Gupta et al.,
Diagonal State Spaces are as Effective as Structured State Spaces (DSS), 2022, section 3.
"""

import torch
import torch.nn.functional as F
from torch import nn

from scalekern import _checks
from scalekern.nn._ssm_kernels import DSSKernel, S4DKernel, SSMKernelDiag, SSMKernelDPLR
from scalekern.ops.fft_conv import fft_conv

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "id": lambda x: x}


class _Convolution(nn.Module):
    """y = K * u + D u for each channel: (B, H, L) to (B, C H, L). What holds `kernel` and D (C, H) or (H,)."""

    def convolve(self, u, l_max=None, bidirectional=False):
        length = u.shape[-1]
        taps = max(1, length if l_max is None else min(length, l_max))
        k = self.kernel(taps)
        k_reverse = None
        if bidirectional:  # the second half of the channels looks ahead, from the next token on
            k, k_reverse = k.chunk(2)
            k_reverse = F.pad(k_reverse, (1, 0)).flatten(0, 1)
        u = u.repeat(1, len(k), 1) if len(k) > 1 else u
        return fft_conv(u, k.flatten(0, 1), skip=self.D.flatten(), k_reverse=k_reverse)

    def recur(self, u, state, discretized):
        channels = self.kernel.channels
        u = u.repeat(1, channels, 1) if channels > 1 else u
        return self.kernel.scan(u, self.D.flatten(), state, discretized)


class _Layer(nn.Module):
    """Layout, masks and states around a _Convolution, which `self.convolution` is or holds."""

    def forward(self, u, *, mask=None, initial_state=None, return_last_state=False, discretized=None):
        """Run a whole sequence, or its next tokens.

        Args:
            u: (B, H, L), or (B, L, H) without `transposed`.
            mask: (B, L), zero or False where a row is padded: a row then gives what it gives alone (but for DSS's
                softmax, whose kernel is one for the whole length).
            initial_state: complex (B, C H, N / 2) (DSS: N), the model's state before the first token. Not changed;
                gradients flow into it. With states the model is a recurrence, which no limit on its taps cuts off.
            return_last_state: also return the state after the last token.
            discretized: `discretize()`, which then is not computed anew: what decoding should pass.

        Returns:
            u's shape, or that and the state.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape; a state where the model has none
                (bidirectional, or DSS's softmax, whose kernel depends on its length).
        """
        name = f"nn.{type(self).__name__}"
        last = self.output_linear[0] if isinstance(self.output_linear, nn.Sequential) else self.output_linear
        last = last.weight if type(last) is TransposedLinear else last
        _checks.tensor(name, "u", u, dims=3, dtypes=_checks.taken_by(last))
        shape = (None, self.d_model, None) if self.transposed else (None, None, self.d_model)
        _checks.shape(name, "u", u, shape)
        u = u if self.transposed else u.transpose(1, 2)
        _checks.padding(name, mask, u, u.shape[0], u.shape[2])
        if mask is not None:
            u = u.masked_fill((mask == 0)[:, None], 0)
        if initial_state is None and not return_last_state:
            y = self.convolution.convolve(u, self.l_max, self.bidirectional)
            state = None
        elif self.bidirectional:
            raise ValueError(f"{name}: a bidirectional model has no states")
        else:
            y, state = self.convolution.recur(u, initial_state, discretized)
        out = self._output(y)
        out = out if self.transposed else out.transpose(1, 2)
        return (out, state) if return_last_state else out

    def step(self, u, state, discretized=None):
        """One token: u (B, H) -> (out (B, H), state); see `forward`."""
        _checks.tensor(f"nn.{type(self).__name__}", "u", u, dims=2, dtypes=_checks.FLOATING)
        axis = 2 if self.transposed else 1
        out, state = self.forward(
            u.unsqueeze(axis), initial_state=state, return_last_state=True, discretized=discretized
        )
        return out.squeeze(axis), state

    def discretize(self):
        return self.convolution.kernel.discretize()

    def default_state(self, batch_size, dtype=torch.complex64):
        """Zeros (B, C H, N / 2); DSS (B, C H, N)."""
        C = self.convolution.kernel.ssm()[2]
        return torch.zeros(batch_size, *C.shape, dtype=dtype, device=C.device)


class S4D(_Layer, _Convolution):
    """(B, H, L) to the same: GLU(W gelu(K * u + D u)), K of a diagonal model under the zero-order hold.

    Args:
        d_model: H.   d_state: N, even.   dropout: after the activation.
        transposed: (B, H, L), else (B, L, H).   kernel_args: dt_min, dt_max, lr (0 makes log_dt and A buffers).
    """

    l_max, bidirectional = None, False

    def __init__(self, d_model, d_state=64, dropout=0.0, transposed=True, device=None, dtype=None, **kernel_args):
        super().__init__()
        _checks.at_least("nn.S4D", "d_model", d_model, 1)
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.transposed = d_model, transposed
        self.D = nn.Parameter(torch.randn(d_model, **factory))
        self.kernel = S4DKernel(d_model, d_state, **kernel_args, **factory)
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1, **factory), nn.GLU(-2))

    @property
    def convolution(self):
        return self

    def _output(self, y):
        if y.shape[2] == 0:  # which nn.Conv1d refuses
            return y
        return self.output_linear(self.dropout(F.gelu(y)))


class S4Convolution(_Convolution):
    """The `layer` of S4: D and a kernel."""

    def __init__(self, d_model, mode, channels, directions, factory, **kernel_args):
        super().__init__()
        self.D = nn.Parameter(torch.randn(channels, d_model, **factory))
        kernel = SSMKernelDPLR if mode == "dplr" else SSMKernelDiag
        self.kernel = kernel(d_model, channels=channels * directions, **kernel_args, **factory)


class S4(_Layer):
    """(B, H, L) to the same: GLU(W act(K * u + D u)), K of a model with a diagonal plus low-rank A, or a diagonal one.

    Args:
        d_model: H.   d_state: N, even.   l_max: the most taps of K.   channels: C.
        bidirectional: a second kernel looks ahead, from the next token on.
        mode: "dplr" (S4) or "diag".
        activation: "gelu", "silu", "relu" or "id".   final_act: "glu" or "id", after the last linear layer.
        dropout: after the activation.   transposed: (B, H, L), else (B, L, H).
        kernel_args: init ("legs", "legt", "lagt", "fout"; for "diag" "diag-lin", "diag-inv", "diag-legs"), rank, n_ssm
            (S), dt_min, dt_max, lr; for "diag" disc ("zoh", "bilinear").

    Upstream's gate, bottleneck, weight_norm and tie_dropout stay at their defaults here.

    Raises:
        ValueError: an unknown option; a rank below that of the initialization; an n_ssm that does not divide d_model.
    """

    def __init__(
        self, d_model, d_state=64, l_max=None, channels=1, bidirectional=False, mode="dplr", activation="gelu",
        final_act="glu", dropout=0.0, transposed=True, device=None, dtype=None, **kernel_args,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least("nn.S4", "d_model", d_model, 1)
        _checks.at_least("nn.S4", "channels", channels, 1)
        _checks.size_or_none("nn.S4", "l_max", l_max)
        _checks.choice("nn.S4", "mode", mode, ("dplr", "diag"))
        _checks.choice("nn.S4", "activation", activation, tuple(ACTIVATIONS))
        _checks.choice("nn.S4", "final_act", final_act, ("glu", "id"))
        _checks.choice("nn.S4", "disc", kernel_args.get("disc", "zoh"), ("zoh", "bilinear"))
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.l_max, self.bidirectional, self.transposed = d_model, l_max, bidirectional, transposed
        self.activation = ACTIVATIONS[activation]
        if mode == "dplr":
            kernel_args["l_max"] = l_max
        self.layer = S4Convolution(
            d_model, mode, channels, 2 if bidirectional else 1, factory, d_state=d_state, **kernel_args
        )
        self.drop = nn.Dropout(dropout)
        wide, last = (2 * d_model, nn.GLU(-1)) if final_act == "glu" else (d_model, nn.Identity())
        self.output_linear = nn.Sequential(nn.Linear(channels * d_model, wide, **factory), last)

    @property
    def convolution(self):
        return self.layer

    def _output(self, y):
        return self.output_linear(self.drop(self.activation(y)).transpose(1, 2)).transpose(1, 2)


class TransposedLinear(nn.Module):
    """weight (out, in) times (B, in, L), and a bias (out, 1)."""

    def __init__(self, d_input, d_output, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_output, d_input, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d_output, 1, device=device, dtype=dtype))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(d_input**-0.5), d_input**-0.5)

    def forward(self, x):
        return self.weight @ x + self.bias


class DSS(_Layer, _Convolution):
    """(B, H, L) to the same: W act(K * u + D u), K of a diagonal model whose rows are normalized over the length.

    Args:
        d_model: H.   d_state: N; not in conjugate pairs.   channels: C.   bidirectional: as for S4.
        version: "softmax" (DSS_softmax), or "exp" (DSS_exp), which has states.
        activation: "gelu", "silu", "relu" or "id".   dropout: after it.   transposed: (B, H, L), else (B, L, H).
        max_kernel_length: the most taps of K.   kernel_args: dt_min, dt_max, lr, sep_dt_re_im (log_dt's shape).

    Raises:
        ValueError: an unknown option.
    """

    def __init__(
        self, d_model, d_state=64, channels=1, bidirectional=False, version="softmax", activation="gelu", dropout=0.0,
        transposed=True, max_kernel_length=None, device=None, dtype=None, **kernel_args,
    ):  # fmt: skip
        super().__init__()
        _checks.at_least("nn.DSS", "d_model", d_model, 1)
        _checks.at_least("nn.DSS", "channels", channels, 1)
        _checks.size_or_none("nn.DSS", "max_kernel_length", max_kernel_length)
        _checks.choice("nn.DSS", "activation", activation, tuple(ACTIVATIONS))
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.l_max, self.bidirectional = d_model, max_kernel_length, bidirectional
        self.transposed, self.activation = transposed, ACTIVATIONS[activation]
        self.D = nn.Parameter(torch.randn(channels, d_model, **factory))
        kernels = channels * (2 if bidirectional else 1)
        self.kernel = DSSKernel(d_model, d_state, kernels, version, **kernel_args, **factory)
        self.dropout = nn.Dropout(dropout)
        linear = TransposedLinear if transposed else nn.Linear
        self.output_linear = linear(channels * d_model, d_model, **factory)

    @property
    def convolution(self):
        return self

    def _output(self, y):
        y = self.dropout(self.activation(y))
        return self.output_linear(y) if self.transposed else self.output_linear(y.transpose(1, 2)).transpose(1, 2)
