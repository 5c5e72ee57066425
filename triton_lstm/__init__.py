"""LSTM for PyTorch in Triton: recurrent weights stay on chip over all timesteps, backward recomputes the gates."""
from .functional import lstm
from .layer import LSTM
from .plan import Plan, PlanError, make_plan

__all__ = ["LSTM", "Plan", "PlanError", "lstm", "make_plan"]
__version__ = "0.1.0"
