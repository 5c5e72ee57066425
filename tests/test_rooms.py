"""Rules of the source: which file may import which, and which one file knows each data format."""
import ast
import pathlib
import re

import pytest

from triton_lstm.kernels import launch

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = {path.stem: path for path in (ROOT / "kernels").glob("*.py")}
PACKAGE = {path.relative_to(ROOT / "triton_lstm").with_suffix("").as_posix().replace("/", "."): path
           for path in (ROOT / "triton_lstm").rglob("*.py")}


def imported(path):
    """(modules of its own folder, names of absolute imports) that a file imports."""
    relative, absolute = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            relative.update([node.module] if node.module else [alias.name for alias in node.names])
    return relative, absolute


def with_kernels():
    """The modules of kernels/ that define kernels which are launched."""
    launched = {kernel.__name__ for kernel in (launch.COEFFICIENTS, launch.PREVIOUS, launch.STATES, launch.STEP,
                                               *(loop.kernel for loop in launch.LOOPS.values()))}
    names = lambda path: {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    found = {stem for stem, path in KERNELS.items() if names(path) & launched}
    assert launched == set().union(*(names(KERNELS[stem]) & launched for stem in found))
    return found


def test_no_kernel_module_imports_another():
    kernel_modules = with_kernels()
    assert len(kernel_modules) == 8 and all(stem.endswith(("_forward", "_backward")) for stem in kernel_modules)
    for stem in kernel_modules:
        assert not imported(KERNELS[stem])[0] & kernel_modules, stem


def test_kernels_know_nothing_of_the_layers():
    for stem, path in KERNELS.items():
        relative, absolute = imported(path)
        assert relative <= set(KERNELS), stem
        assert {name.split(".")[0] for name in absolute}.isdisjoint({"triton_lstm", "tests", "bench"}), stem
    for name, path in PACKAGE.items():
        assert {found.split(".")[0] for found in imported(path)[1]}.isdisjoint({"tests", "bench", "triton_lstm"}), name


@pytest.mark.parametrize("folder", ["kernels", "triton_lstm", "triton_lstm/plan", "bench"])
def test_no_import_circles(folder):
    files = {path.stem: path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
    left = {stem: imported(path)[0] & set(files) - {stem} for stem, path in files.items()}
    while free := {stem for stem, needs in left.items() if not needs}:
        left = {stem: needs - free for stem, needs in left.items() if stem not in free}
    assert not left


# Code that knows a format: the flag in the last bit of a share of dh, the empty slot for h, the bits of step flags, the
# offsets of packed rows, the random generator of zoneout, rounding to TF32, waits with a time limit.
FORMATS = {"exchange": [r"& -2\b", r"fill_\(-1\)", r"0xffffffff", r"0x7FFFFFFF\b"],
           "rows": [r"load\(offsets_ptr", r"1 << n\b", r"accumulate\("],
           "cell": [r"PHILOX"], "precision": [r"cvt\.rna", r"allow_tf32"], "waiting": [r"globaltimer", r"\btrap;"]}


@pytest.mark.parametrize("room", FORMATS)
def test_each_format_has_one_room(room):
    for pattern in FORMATS[room]:
        known = {stem for stem, path in KERNELS.items() if re.search(pattern, path.read_text())}
        assert known == {room}, pattern
