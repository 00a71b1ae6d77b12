"""Defects of the convolutions and of the state space models' kernels."""

import torch
from mutants.defects import ones_for_none, flipped, given, halved, ignored, output, shifted, state, swapped, zeroed

FORWARD = {
    "toeplitz_conv_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "taps shifted": given(k=shifted(1)),
        "oldest tap dropped": given(k=zeroed(1, -1)),
        "two filters swapped": given(k=swapped(0)),
    },
    "depthwise_conv2d_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last column not computed": output(0, zeroed(3, -1)),
        "taps shifted": given(w=shifted(2)),
        "first row of taps dropped": given(w=zeroed(1, 0)),
        "filters flipped": given(w=lambda w: w.flip(1, 2)),
        **ignored("bias"),
    },
    "depthwise_conv_transpose2d_fwd": {
        "two channels swapped": output(0, swapped(1)),
        "last column not computed": output(0, zeroed(3, -1)),
        "filters flipped": given(w=lambda w: w.flip(1, 2)),
        **ignored("bias"),
    },
    "diag_ssm_kernel_fwd": {
        "two heads swapped": output(0, swapped(0)),
        "first tap dropped": output(0, zeroed(1, 0)),
        "taps shifted": output(0, shifted(1)),
        **flipped("conjugate_pairs"),
        "last state's term dropped": given(C=zeroed(1, -1)),
        "steps of two heads swapped": given(dt=swapped(0)),
    },
    "dplr_ssm_kernel_fwd": {
        "two heads swapped": output(0, swapped(0)),
        "taps shifted": output(0, shifted(1)),
        **ignored("P"),
        **flipped("conjugate_pairs"),
        "last state's term dropped": given(C=zeroed(1, -1)),
    },
    "diag_ssm_fwd": {
        "two heads swapped": output(0, swapped(1)),
        "last token not computed": output(0, zeroed(2, -1)),
        "last state of another row": output(1, swapped(0)),
        **ignored("D", "initial_state"),
        **flipped("conjugate_pairs"),
        "last state's term dropped": given(C=zeroed(1, -1)),
        "discretized twice": lambda run, args: run({**args, "dt": ones_for_none(args["dt"], args["A"])}),
    },
    "dwt2d_fwd": {
        "two channels of the details swapped": output(1, swapped(1)),
        "horizontal and vertical swapped": output(1, lambda x: x[:, :, [1, 0, 2]]),
        "last column of low not computed": output(0, zeroed(3, -1)),
    },
    "idwt2d_fwd": {
        "last column not computed": output(0, zeroed(3, -1)),
        "two channels swapped": output(0, swapped(1)),
        **ignored("low"),
    },
}

GRADIENTS = {
    "toeplitz_conv_bwd": {
        "two channels of du swapped": output(0, swapped(1)),
        "last token of du not computed": output(0, zeroed(2, -1)),
        "taps of dk shifted": output(1, shifted(1)),
        "half of dk's terms lost": output(1, halved),
        "taps shifted": given(k=shifted(1)),
    },
    "depthwise_conv2d_bwd": {
        "two channels of dx swapped": output(0, swapped(1)),
        "last column of dx not computed": output(0, zeroed(3, -1)),
        "taps of dw shifted": output(1, shifted(2)),
        "half of dw's terms lost": output(1, halved),
        "two channels of dbias swapped": output(2, swapped(0)),
        "filters flipped": given(w=lambda w: w.flip(1, 2)),
    },
    "depthwise_conv_transpose2d_bwd": {
        "last column of dx not computed": output(0, zeroed(3, -1)),
        "taps of dw shifted": output(1, shifted(2)),
        "two channels of dbias swapped": output(2, swapped(0)),
    },
    "diag_ssm_kernel_bwd": {
        "two heads of dA swapped": output(0, swapped(0)),
        "half of dB's terms lost": output(1, halved),
        "last state of dC not computed": output(2, zeroed(1, -1)),
        "two heads of ddt swapped": output(3, swapped(0)),
        "first tap ignored": given(dout=zeroed(1, 0)),
    },
    "dplr_ssm_kernel_bwd": {
        "two heads of dLambda swapped": output(0, swapped(0)),
        "half of dP's terms lost": output(1, halved),
        "last state of dB not computed": output(2, zeroed(1, -1)),
        "half of ddt's terms lost": output(4, halved),
        **ignored("P"),
    },
    "diag_ssm_bwd": {
        "two heads of du swapped": output(0, swapped(1)),
        "last token of du not computed": output(0, zeroed(2, -1)),
        "half of dA's terms lost": output(1, halved),
        "last state of dB not computed": output(2, zeroed(1, -1)),
        "half of dC's terms lost": output(3, halved),
        "two heads of dD swapped": output(4, swapped(0)),
        "half of ddt's terms lost": output(5, halved),
        "dinitial_state not computed": output(6, zeroed(0, -1)),
        **ignored("dlast_state", "initial_state"),
    },
    "dwt2d_bwd": {"last column not computed": output(0, zeroed(3, -1)), **ignored("dlow")},
    "idwt2d_bwd": {
        "dlow not computed": output(0, torch.zeros_like),
        "horizontal and vertical swapped": output(1, lambda x: x[:, :, [1, 0, 2]]),
    },
}
