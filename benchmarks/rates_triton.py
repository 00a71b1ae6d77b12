"""Exponentials a second of a CUDA device (needs Triton)."""

import torch
import triton
import triton.language as tl

from scalekern.benchmarks.rates import best_of

STEPS = 256


@triton.jit
def _exp_rate_kernel(out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    # Four elements a thread hide the latency of a chain; the negation keeps the values in (0, 1) and costs no exp.
    x = tl.arange(0, BLOCK).to(tl.float32) * (1.0 / BLOCK)  # [BLOCK]
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def exp_rate() -> float:
    device = torch.device("cuda")
    blocks, width = 16 * torch.cuda.get_device_properties(device).multi_processor_count, 1024
    out = torch.empty(blocks * width, device=device)
    seconds = best_of(device, lambda: _exp_rate_kernel[(blocks,)](out, STEPS=STEPS, BLOCK=width, num_warps=8))
    return blocks * width * STEPS / seconds
