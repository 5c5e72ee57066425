"""Which kernels run a layer, and where they hold the recurrent weights R. Plans are computed without a GPU."""
from .check import check_plan
from .cost import step_cycles
from .limits import A100, B200, H100, H200, RTX_3090, RTX_4090, RTX_5090, Limits
from .plan import SCHEDULES, Plan, PlanError
from .search import candidates, combined, contenders, keep_every_for, make_plan, precision_for

__all__ = ["A100", "B200", "H100", "H200", "RTX_3090", "RTX_4090", "RTX_5090", "SCHEDULES", "Limits", "Plan",
           "PlanError", "candidates", "check_plan", "combined", "contenders", "keep_every_for", "make_plan",
           "precision_for", "step_cycles"]
