"""An install has one top-level package, ``triton_lstm``, with its kernels."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy of the checkout, without network."""
    source, out = tmp_path_factory.mktemp("source") / "triton_lstm", tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "results")
    shutil.copytree(ROOT, source, ignore=leave)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], check=True,
                   capture_output=True, text=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"triton_lstm"}
    for module in (ROOT / "kernels").glob("*.py"):
        assert f"triton_lstm/kernels/{module.name}" in names
    assert {"triton_lstm/py.typed", "triton_lstm/plan/plan.py", "triton_lstm/rl/sb3.py", "triton_lstm/rl/README.md",
            "triton_lstm/TROUBLESHOOTING.md"} <= set(names)


def test_sdist(built):
    names = {name.split("/", 1)[-1] for name in tarfile.open(built[1]).getnames()}
    for path in ("kernels/sequence.py", "kernels/README.md", "triton_lstm/rl/README.md", "triton_lstm/RECIPES.md",
                 "tests/conftest.py", "tests/ptx_emulator/__init__.py", "bench/__main__.py", "bench/README.md",
                 "bench/host_stubs/libcuda.c", ".ci/docs.py", "README.md", "CONTRIBUTING.md", "LICENSE"):
        assert path in names


def test_wheel_imports_without_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    program = "import triton_lstm.kernels.launch as k, triton_lstm; print(k.__file__, triton_lstm.LSTM(2, 3))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{tmp_path}/triton_lstm/kernels/launch.py LSTM(2, 3)"


def test_checkout_needs_no_install():
    program = "import triton_lstm.kernels.launch as k; print(k.__file__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == f"{ROOT}/kernels/launch.py", result.stderr


def test_import_is_light():
    """Importing compiles nothing, uses no GPU, and imports neither matplotlib nor packages for tests."""
    program = ("import sys, triton_lstm, torch; print(torch.cuda.is_initialized(), "
               "[m for m in ('matplotlib', 'greenlet', 'pytest', 'bench') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split(maxsplit=1) == ["False", "[]\n"], result.stderr
