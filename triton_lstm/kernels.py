"""Finds the kernels: the folder beside this file when installed, ``../kernels`` in a checkout."""
from pathlib import Path

_here = Path(__file__).resolve()
__path__ = [str(next(p for p in (_here.with_suffix(""), _here.parent.parent / "kernels") if p.is_dir()))]
