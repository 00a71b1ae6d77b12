"""Tensors that outlive the call that makes them: tables, plans, layouts of weights."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def made(make: Callable, device: torch.device):
    """make(), whose tensors on a GPU lie in the memory that all share.

    The first run of torch.compile(mode="reduce-overhead") allocates from a pool of its own and fails if anything but
    the results is left there (check_memory_pool of torch/_inductor/cudagraph_trees.py); a pool of torch.cuda.use_mem_pool
    may end before what is kept. Either holds for one thread: what is kept comes from another one, on the same stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make()
    stream = torch.cuda.current_stream(device)

    def run():
        with torch.no_grad(), torch.cuda.stream(stream):  # the device too
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()
