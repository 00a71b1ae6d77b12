"""scalekern: kernels for the cores that decide how far a sequence model scales."""

from scalekern import masks, quant
from scalekern._dispatch import BackendError, backend
from scalekern.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from scalekern.ops.cross_scan import cross_merge, cross_scan
from scalekern.ops.cross_selective_scan import cross_selective_scan
from scalekern.ops.depthwise_conv2d import depthwise_conv2d, depthwise_conv_transpose2d, merge_dilated_branches
from scalekern.ops.diag_scan import diag_scan
from scalekern.ops.diag_ssm import diag_ssm, diag_ssm_discretize
from scalekern.ops.diag_ssm_kernel import diag_ssm_kernel
from scalekern.ops.dplr_ssm_kernel import dplr_ssm_kernel, truncate_C
from scalekern.ops.dwt2d import dwt2d, idwt2d
from scalekern.ops.fake_quantize import fake_quantize
from scalekern.ops.fft_conv import fft_conv, fft_conv_chunk, fft_conv_spectrum, fft_conv_step
from scalekern.ops.hadamard_transform import fused_hadamard_quantize, hadamard_transform
from scalekern.ops.hstu_attention import hstu_attention
from scalekern.ops.mamba_inner import mamba_inner
from scalekern.ops.mamba_update import mamba_update
from scalekern.ops.merge_attention import merge_attention
from scalekern.ops.quant_matmul import quant_matmul
from scalekern.ops.quantize_kv import quantize_kv, quantize_kv_update
from scalekern.ops.quantized_mamba_update import quantized_mamba_update
from scalekern.ops.quantized_selective_scan import quantized_selective_scan
from scalekern.ops.quantized_ssd_scan import quantized_ssd_scan
from scalekern.ops.quantized_state_update import quantized_state_update
from scalekern.ops.relative_position_buckets import relative_position_buckets
from scalekern.ops.selective_scan import selective_scan
from scalekern.ops.selective_state_update import selective_state_update
from scalekern.ops.sparse_attention import sparse_attention
from scalekern.ops.sparse_attention_decode import sparse_attention_decode
from scalekern.ops.ssd_scan import ssd_scan
from scalekern.ops.toeplitz_conv import toeplitz_conv

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "backend",
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
    "masks",
    "merge_attention",
    "merge_dilated_branches",
    "quant",
    "quant_matmul",
    "quantize_kv",
    "quantize_kv_update",
    "relative_position_buckets",
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
