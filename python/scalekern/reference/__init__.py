"""The oracles: every op in plain torch, in float64 when asked. They import no kernel."""

from scalekern.reference.causal_conv1d import causal_conv1d, causal_conv1d_update
from scalekern.reference.cross_scan import cross_merge, cross_scan, cross_selective_scan
from scalekern.reference.depthwise_conv2d import (
    depthwise_conv2d,
    depthwise_conv_transpose2d,
    merge_dilated_branches,
)
from scalekern.reference.diag_scan import diag_scan
from scalekern.reference.diag_ssm import diag_ssm, diag_ssm_discretize, diag_ssm_kernel
from scalekern.reference.dplr_ssm import dplr_ssm_kernel, truncate_C
from scalekern.reference.dwt2d import dwt2d, idwt2d
from scalekern.reference.fake_quantize import fake_quantize
from scalekern.reference.fft_conv import fft_conv, fft_conv_chunk, fft_conv_spectrum, fft_conv_step, toeplitz_conv
from scalekern.reference.hadamard_transform import fused_hadamard_quantize, hadamard_transform
from scalekern.reference.hstu_attention import hstu_attention
from scalekern.reference.mamba_inner import mamba_inner
from scalekern.reference.mamba_update import mamba_update
from scalekern.reference.merge_attention import merge_attention
from scalekern.reference.quant_matmul import quant_matmul
from scalekern.reference.quantize_kv import quantize_kv, quantize_kv_update
from scalekern.reference.quantized_mamba_update import quantized_mamba_update
from scalekern.reference.quantized_scan import quantized_selective_scan, quantized_ssd_scan, quantized_state_update
from scalekern.reference.selective_scan import selective_scan
from scalekern.reference.selective_state_update import selective_state_update
from scalekern.reference.sparse_attention import sparse_attention
from scalekern.reference.sparse_attention_decode import sparse_attention_decode
from scalekern.reference.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "depthwise_conv2d",
    "depthwise_conv_transpose2d",
    "diag_scan",
    "diag_ssm",
    "diag_ssm_discretize",
    "diag_ssm_kernel",
    "dplr_ssm_kernel",
    "dwt2d",
    "idwt2d",
    "fake_quantize",
    "fft_conv",
    "fft_conv_chunk",
    "fft_conv_spectrum",
    "fft_conv_step",
    "fused_hadamard_quantize",
    "hadamard_transform",
    "hstu_attention",
    "mamba_inner",
    "mamba_update",
    "merge_attention",
    "merge_dilated_branches",
    "quant_matmul",
    "quantize_kv",
    "quantize_kv_update",
    "quantized_mamba_update",
    "quantized_selective_scan",
    "quantized_ssd_scan",
    "quantized_state_update",
    "selective_scan",
    "selective_state_update",
    "sparse_attention",
    "sparse_attention_decode",
    "ssd_scan",
    "toeplitz_conv",
    "truncate_C",
]
