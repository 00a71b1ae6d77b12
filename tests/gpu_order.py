"""`pytest -p gpu_order`: the tests of a GPU, the most telling first, until the time is up.

SCALEKERN_TEST_SECONDS: what is not reached within them is skipped with that reason. A CUDA error after which a process
can do nothing more ends its xdist worker, so that it costs one test and not all that would follow.
"""

import os
import re
import time

import pytest

# By the importance of what they can find; a GPU that is lent for minutes reaches the first ones only.
ORDER = (
    "test_forward_agrees_with_the_oracle", "test_gradients_agree_with_autograd_of_the_oracle", "",  # "": ops' own tests
    "test_repeats_bit_for_bit", "test_captured_in_a_cuda_graph", "test_strides_change_nothing", "test_empty_axes",
    "test_an_expanded_gradient_is_read_in_place", "test_nan_and_inf_travel_as_in_the_oracle", "test_gradcheck",
    "test_a_defect_of_a_kernel_would_be_seen",
)  # fmt: skip
LATER = ("torch.float16", "torch.float64")  # the same code as bfloat16 and float32, but for rounding
STICKY = re.compile(
    "illegal memory access|unspecified launch failure|misaligned address|device-side assert|illegal instruction"
)
END = time.time() + float(os.environ.get("SCALEKERN_TEST_SECONDS", "inf"))


def rank(item) -> tuple[bool, int]:
    name = item.originalname if item.originalname in ORDER else ""
    return any(dtype in item.nodeid for dtype in LATER), ORDER.index(name)


def pytest_collection_modifyitems(config, items):
    # Neighbours compile the same kernels: apart from each other, one of them finds what the other has compiled.
    items.sort(key=lambda item: (*rank(item), sum(map(ord, item.nodeid)) % 997, item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > END:
        pytest.skip("the time was up")


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    yield
    if call.excinfo is not None and "PYTEST_XDIST_WORKER" in os.environ and STICKY.search(str(call.excinfo.value)):
        os._exit(1)
