import os
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET"):
    pytest.exit("the tests choose the interpreter themselves: unset TRITON_INTERPRET", returncode=2)


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised tensors are full of NaN, so that an element nobody writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

    with mock.patch.object(torch.Tensor, "new_empty", poisoned):
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
