"""Remembers in the user's cache folder what ``python -m triton_lstm check`` found wrong on a GPU.

A JSON file (see ``cachefile``): {where: {"variant loop precision": what was found}}, where "where" names the GPU, its
driver and the versions of Triton and this package.
"""
import contextlib
import functools
import importlib.metadata
import warnings

import torch

from . import cachefile
from .kernels.language import VERSION

LOOPS = ("forward", "backward")
FILE = "faults.json"


def version():
    """The installed version of this package, or "unknown" if it is not installed."""
    try:
        return importlib.metadata.version("triton_lstm")
    except importlib.metadata.PackageNotFoundError:     # a checkout on the path
        return "unknown"


def driver():
    """The CUDA version of the GPU's driver, such as 13000 for 13.0; 0 if torch does not tell it."""
    with contextlib.suppress(AttributeError):
        return torch._C._cuda_getDriverVersion()         # pyright: ignore[reportAttributeAccessIssue]
    return 0


def place(device):
    """The key under which the file holds the faults of a CUDA device."""
    return f"{torch.cuda.get_device_name(device)}, driver {driver()}, Triton {VERSION}, {version()}"


def _check(found):
    """Raise unless ``found`` is what this file holds."""
    if not (isinstance(found, dict) and all(isinstance(of, dict) and all(
            len(key.rsplit(" ", 2)) == 3 for key in of) for of in found.values())):
        raise ValueError("not a table of faults")


def remember(where, found, right):
    """Add ``found``, {(variant, loop, precision): what}, to the entries of ``where``, and remove those of ``right``, a
    set of such keys."""
    def change(entries):
        left = {key: what for key, what in entries.get(where, {}).items() if tuple(key.rsplit(" ", 2)) not in right}
        entries[where] = {**left, **{" ".join(key): what for key, what in found.items()}}
        return {where: of for where, of in entries.items() if of}
    cachefile.update(FILE, _check, change)


def of(where):
    """The entries of a ``place``: {(variant, loop, precision): what}."""
    return {tuple(key.rsplit(" ", 2)): what for key, what in cachefile.read(FILE, _check).get(where, {}).items()}


@functools.lru_cache
def known(device):
    """The keys that automatic plans avoid on a CUDA device. They are looked up once a process, with a warning."""
    found = of(place(device))
    if found:
        warnings.warn("triton_lstm keeps away from kernels that its check found wrong on this GPU: "
                      + "; ".join(f"{' '.join(key)} ({what})" for key, what in sorted(found.items()))
                      + ". `python -m triton_lstm check` looks again", stacklevel=2)
    return frozenset(found)
