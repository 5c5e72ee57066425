"""Finds the kernels: the folder beside this file when installed, ``../kernels`` in a checkout."""
import typing
from pathlib import Path

_here = Path(__file__).resolve()
__path__ = [str(next(p for p in (_here.with_suffix(""), _here.parent.parent / "kernels") if p.is_dir()))]

if typing.TYPE_CHECKING:        # a type checker does not follow __path__
    def __getattr__(name: str) -> typing.Any: ...
