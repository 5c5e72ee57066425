"""Switches, as ``torch.backends.cudnn`` has them.

benchmark    whether the first call of each new kind measures which plan is the fastest, see ``triton_lstm.tune``. False
             unless the environment variable TRITON_LSTM_BENCHMARK is 1
"""
import os

__all__ = ["benchmark"]

VARIABLE = "TRITON_LSTM_BENCHMARK"


def _from_environment():
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


benchmark: bool = _from_environment()
