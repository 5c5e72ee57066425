"""LSTM for PyTorch in Triton: recurrent weights stay on chip over all timesteps, backward recomputes the gates.

The pages RECIPES.md, TUNING.md, TROUBLESHOOTING.md and LIMITS.md lie beside this file.
"""
import logging

import torch

from . import backends
from .conversion import Conversion, convert, everywhere, to_torch
from .dropconnect import drop_connect
from .explanation import explain
from .functional import lstm
from .graphed import make_graphed
from .inspection import Gates, gates, plot_gates
from .kernels.waiting import set_wait_limit, wait_report
from .layer import LSTM
from .lstm_cell import LSTMCell
from .plan import Plan, PlanError, make_plan
from .plan.limits import AMD
from .tuning import tune
from .warming import warm

# in the order of the API reference
__all__ = ["LSTM", "LSTMCell", "lstm", "convert", "to_torch", "everywhere", "Conversion", "make_graphed", "warm",
           "tune", "backends", "explain", "Plan", "PlanError", "make_plan", "gates", "Gates", "plot_gates",
           "drop_connect", "set_wait_limit", "wait_report"]
__version__ = "0.1.0"

if torch.version.hip is not None:
    logging.getLogger("triton_lstm").warning("triton_lstm uses torch's own LSTM: %s", AMD)
