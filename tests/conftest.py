import contextlib
import functools
import os
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
    pytest.exit("the tests choose the interpreter themselves: unset TRITON_INTERPRET", returncode=2)

import harness  # noqa: E402
from triton_lstm import eager, replay  # noqa: E402

# Products in the tests are so small that more threads only slow them down.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_recordings():
    """Recordings of one test would run what that test has patched."""
    replay._known.cache_clear()


@pytest.fixture(autouse=True)
def poison():
    """Fills with NaN what the launcher allocates, and what a layer takes over from another as workspace, so that an
    element that is never written is noticed."""
    new_empty = torch.Tensor.new_empty

    @functools.wraps(new_empty)
    def poisoned_empty(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

    def poisoned(function):
        def run(*args, **kwargs):
            with mock.patch.object(torch.Tensor, "new_empty", poisoned_empty):
                return function(*args, **kwargs)
        return run

    def poisoned_workspace(empty):
        def run(self, *args):
            return empty(self, *args) if args[1].is_meta else empty(self, *args).fill_(float("nan"))
        return run

    with contextlib.ExitStack() as stack:
        for module in (harness.interpreted_sequence, harness.compiled_sequence):
            empty = poisoned_workspace(module.Workspace.empty)
            stack.enter_context(mock.patch.object(module.Workspace, "empty", empty))
        single, several = ("forward", "backward", "one_step"), ("_forward", "_backward")
        for module, names in ((harness.interpreted_sequence, single), (harness.compiled_sequence, single),
                              (eager, several)):
            for name in names:
                stack.enter_context(mock.patch.object(module, name, poisoned(getattr(module, name))))
        yield


def pytest_addoption(parser):
    parser.addoption("--arch", type=int, choices=list(harness.LIMITS),
                     help="compile what runs in the emulator for this compute capability, times ten, in place of the "
                          "one that each test names")


def pytest_configure(config):
    harness.ARCH = config.getoption("arch")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords:
            # On a GPU machine other versions of torch and Triton may warn of anything; only our warnings are errors.
            for these in ("error:::triton_lstm", "default"):
                item.add_marker(pytest.mark.filterwarnings(these), append=False)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
