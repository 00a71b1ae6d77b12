"""`pytest benchmarks`: the cases of this machine's device as pytest-benchmark cases."""

import dataclasses
import inspect

import pytest
import torch

from scalekern.benchmarks import harness


def pytest_addoption(parser):
    group = parser.getgroup("scalekern")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--bench-seconds", type=float, default=2.0, help="time for the samples of each contender of a case")
    group.addoption("--records", metavar="DIR", help="write the records there")


def pytest_collect_file(file_path, parent):
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        family = inspect.getmodule(metafunc.function).__name__.rpartition("bench_")[2]
        device = metafunc.config.getoption("--bench-device")
        cases = [dataclasses.replace(c, family=family) for c in metafunc.module.CASES if device in c.devices]
        metafunc.parametrize("case", sorted(cases, key=lambda c: c.priority), ids=str)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.clock, group=item.name))


@pytest.fixture(autouse=True)
def _settings(benchmark, request):
    option = request.config.getoption
    benchmark.scalekern = {
        "device": option("--bench-device"), "seconds": option("--bench-seconds"), "folder": option("--records")
    }  # fmt: skip
