"""Fits the constants of the cost model (``triton_lstm.plan.cost``) to the times that ``loops`` measured, or to bounds
from machine code. Needs no GPU and writes nothing."""
import contextlib
import csv
import json
import math
import statistics

import torch

from triton_lstm.plan import Limits, Plan, PlanError, make_plan
from triton_lstm.plan import cost as model

from .console import markdown
from .correctness import dtype_of
from .workloads import WORKLOADS

# What is fitted: (name of a constant, key or None). A constant that is a dict has a key.
CONSTANTS = [("RESIDENT_STEP", None), ("TILE_STEP", None), ("TILE_WORK", None), ("CLUSTER_EXCHANGE", None),
             ("L2_EXCHANGE", None), ("L2_BYTES", None), ("CELL_CYCLES", None), ("STREAMED_STEP", None),
             *(("STREAMED_PASS", loop) for loop in ("forward", "backward")),
             *((name, key) for name in ("GLUON_STEP", "SPLIT_STEP", "SPLIT_PRODUCTS", "WIDE_STEP",
                                        "WIDE_PRODUCTS", "WARP_GROUP_STEP", "WARP_GROUP_UNIT", "WARP_GROUP_LOOK",
                                        "LOOP_SHARE")
               for key in getattr(model, name))]
# Bounds from machine code do not know how long data is on its way.
WITHOUT_EXCHANGE = {("CLUSTER_EXCHANGE", None): 0, ("L2_EXCHANGE", None): 0}
ROUNDS, DIFFERENCE = 60, 1e-4


def load(path):
    """[(plan, loop, measured cycles of a step, limits)] of the rows with status "ok". ValueError if there is none."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("status") == "ok" and row["us_median"]]
    if not rows:
        raise ValueError(f"no measured loop in {path}")
    limits = [Limits(**json.loads(row["limits"])) for row in rows]
    return [(Plan.decode(row["encoded"]), row["loop"], float(row["us_median"]) * of.mhz, of)
            for row, of in zip(rows, limits)]


def get(constant):
    name, key = constant
    value = getattr(model, name)
    return value if key is None else value[key]


def put(constant, value):
    name, key = constant
    setattr(model, name, value if key is None else {**getattr(model, name), key: value})


@contextlib.contextmanager
def trying(values):
    """Inside, the cost model has other constants, {constant: value}."""
    before = {name: getattr(model, name) for name, _ in CONSTANTS}
    try:
        for constant, value in values.items():
            put(constant, value)
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)


def predicted(plan, loop, limits):
    """Cycles of a step of a loop of ``plan``, with the present constants."""
    return model.step_cycles(plan, limits.multiprocessors, loop, limits.multiply_adds)


def residuals(rows):
    """log(predicted / measured) of each row, with the present constants."""
    return [math.log(predicted(plan, loop, limits) / cycles) for plan, loop, cycles, limits in rows]


def fit(rows, constants=CONSTANTS):
    """{constant: value} that about minimises the mean of |log(predicted / measured)|. Outliers have little influence on
    this mean.

    The method is iteratively reweighted least squares in the logarithms of the constants, with damped steps
    (Levenberg-Marquardt) from the present values. The weights 1 / |residual| turn squares into absolute values.
    """
    start = torch.tensor([get(constant) for constant in constants], dtype=torch.float64)
    at = lambda logs: dict(zip(constants, (start * logs.exp()).tolist()))

    def off(logs):
        with trying(at(logs)):
            return torch.tensor(residuals(rows), dtype=torch.float64)

    logs, damping = torch.zeros_like(start), 1e-3
    here = off(logs)
    for _ in range(ROUNDS):
        slopes = torch.stack([(off(logs + step) - here) / DIFFERENCE
                              for step in DIFFERENCE * torch.eye(len(logs), dtype=torch.float64)], 1)
        weights = 1 / here.abs().clamp(min=1e-4)
        matrix = slopes.T @ (weights[:, None] * slopes)
        for _ in range(12):
            damped = matrix + damping * (matrix.diagonal().diag() + torch.eye(len(logs), dtype=torch.float64))
            new = (logs - torch.linalg.solve(damped, slopes.T @ (weights * here))).clamp(-3, 3)
            there = off(new)
            if there.abs().mean() < here.abs().mean():
                break
            damping *= 4
        else:
            break
        gained = here.abs().mean() - there.abs().mean()
        logs, here, damping = new, there, damping / 8
        if gained < 1e-7:
            break
    return at(logs)


def plans(values, limits):
    """{(workload, GPU): text} of the plans that make_plan chooses with these constants. limits: {GPU: its limits}."""
    found = {}
    with trying(values):
        for w in WORKLOADS:
            for gpu, of_gpu in limits.items():
                try:
                    plan = make_plan(w.batch, w.hidden_size, dtype_of(w.dtype), w.directions, limits=of_gpu)
                    text = " / ".join(f"{of.variant} {of.programs} x {of.groups}" for of in (plan, plan.backward))
                except PlanError as error:
                    text = str(error)
                found[w.name, gpu] = text
    return found


def show(rows, source, limits, fixed=None):
    """Print what ``fit`` finds for rows from ``source``, and which plans would change on GPUs with these limits.

    fixed    constants that have this value in the rows, {constant: value}. They are not fitted
    """
    fixed = fixed or {}
    constants = [constant for constant in CONSTANTS if constant not in fixed]
    before = {constant: get(constant) for constant in constants}
    with trying(fixed):
        after = fit(rows, constants)
    label = lambda constant: constant[0] if constant[1] is None else f"{constant[0]}[{constant[1]!r}]"
    print(f"# fitted to {source}, {len(rows)} loops")
    print(markdown(["constant", "old", "new"], [
        (label(c), f"{before[c]:.4g}", f"{after[c]:.4g}") for c in constants
        if not math.isclose(after[c], before[c], rel_tol=1e-3)]))
    for name, values in (("old", before), ("new", after)):
        with trying({**values, **fixed}):
            off = sorted(map(abs, residuals(rows)))
        print(f"{name} constants: predictions and what they are fitted to differ by "
              f"{math.expm1(statistics.median(off)):.1%} in the median, and by at most "
              f"{math.expm1(off[int(0.9 * (len(off) - 1))]):.1%} for nine loops of ten")
    old, new = plans(before, limits), plans(after, limits)
    changed = [(*key, old[key], new[key]) for key in old if old[key] != new[key]]
    print(markdown(["plans that would change", "GPU", "old, forward / backward", "new"], changed) if changed else
          "no plan would change")


def show_measured(path):
    """``show`` for a CSV file of measured loops; returns the exit code."""
    try:
        rows = load(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"cannot fit to {path}: {error}")
        return 1
    show(rows, path.name, {"this one": rows[0][3]})
    return 0
