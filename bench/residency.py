"""Where the recurrent weights R are under each plan, and what the compiler made of its time loops. Needs no GPU."""
import dataclasses

import triton
from triton_lstm.kernels.offline import compile_plan

from triton_lstm import Plan, PlanError, make_plan
from triton_lstm.plan import A100, B200, H200, RTX_3090, RTX_4090, RTX_5090

from . import fit
from .console import markdown, progress
from .correctness import dtype_of
from .machine_code import Report, read
from .workloads import WORKLOADS

LIMITS = {80: A100, 86: RTX_3090, 89: RTX_4090, 90: H200, 100: B200, 120: RTX_5090}        # by architecture
OTHER_INPUTS = 64                   # features of x, where their number changes nothing in the kernels
L2_BYTES_PER_CYCLE = 64             # the most that one multiprocessor reads from L2

LEGEND = """\
Nothing here is measured: all figures are computed from the plan, or read from machine code. R are the recurrent weights
of one direction. Two figures "a / b" belong to the forward / backward time loop.

schedule           where R is and how h travels, see `triton_lstm.Plan`. "split" and "wgmma" are grid plans: in split
                   plans the warps of a program divide the units of the earlier h among themselves; wgmma plans
                   multiply with wgmma, which reads R from shared memory
programs x groups  programs that share one R, x groups of such programs, x directions if there are two
R planned          KiB of R that the plan has on chip in each program
R in registers     KiB of R that the compiled loop keeps in registers over all steps, copies in several warps included.
                   The rest of "R planned" is read from shared memory at each step
R from L2          KiB of R that a program reads from L2 for each batch tile of each step
registers, shared  registers of a thread, and KiB of shared memory of a program
spills, barriers   instructions of these kinds in the time loop
cycles a step      lower bound for all batch tiles of a program, with assumed latencies. It includes one exchange for
                   each tile. It leaves out waiting for other programs, and waves of clusters if not all fit at once

Loops of workloads with resets have step flags. Those of resident and cluster plans with few input features multiply
them by W, where the plan says so. Forward loops of training workloads that keep the gates for backward store them."""


@dataclasses.dataclass(frozen=True)
class Residency:
    """A workload, its plan and the plan's two compiled time loops, or the reason why it has no plan."""
    workload: str
    dtype: str
    plan: Plan | None = None
    forward: Report | None = None
    backward: Report | None = None
    reason: str = ""


def step_cycles(plan, report):
    """Lower bound of the cycles that a program of ``plan`` takes for a step."""
    loop = report.time_loop
    bound = loop.bound
    if plan.streamed_bytes:
        # The loop over the streamed part of R, unless the compiler unrolled it, has a pass for each block_k units.
        passes = -(-(plan.hidden_size - plan.held) // plan.block_k)
        bound += sum((passes - 1) * inner.bound for inner in report.inside(loop) if inner.counts["HMMA"])
    # one pass of the time loop computes one tile
    return plan.tiles * max(bound, plan.streamed_bytes / L2_BYTES_PER_CYCLE)


def one_wave(plan):
    """``plan`` with so few clusters that they all run at the same time."""
    return plan if plan.exchanges else dataclasses.replace(plan, groups=1)


def model_ratio(plan, loop, report, limits):
    """What the cost model predicts for a step of a loop of ``plan`` ("forward" or "backward"), divided by the bound.

    Both are for one wave of programs, and without the time that data is on its way, which the bound does not know.
    """
    with fit.trying(fit.WITHOUT_EXCHANGE):
        return fit.predicted(one_wave(plan), loop, limits) / step_cycles(plan, report)


def model_ratios(found, arch):
    """{(workload, loop): ``model_ratio``} of ``Residency`` objects."""
    return {(f.workload, loop): model_ratio(plan, loop, report, LIMITS[arch]) for f, loop, plan, report in loops(found)}


def loops(found):
    """(``Residency``, loop, its plan, ``Report``) of both loops of each workload that has a plan."""
    return [(f, *of) for f in found if f.plan
            for of in (("forward", f.plan, f.forward), ("backward", f.plan.backward, f.backward))]


def show_fit(archs):
    """Print constants of the cost model that are fitted to the bounds of all workloads' loops on these
    architectures."""
    rows = [(one_wave(plan), loop, step_cycles(plan, report), LIMITS[arch]) for arch in archs
            for _, loop, plan, report in loops(read_plans(WORKLOADS, arch))]
    fit.show(rows, "bounds from machine code", {f"sm_{arch}": LIMITS[arch] for arch in archs}, fit.WITHOUT_EXCHANGE)


def read_plans(workloads, arch=90):
    """The ``Residency`` of each workload on a GPU of architecture ``arch``. A plan that several workloads have is
    compiled once."""
    keys, reasons = {}, {}
    for w in workloads:
        try:
            plan = make_plan(w.batch, w.hidden_size, dtype_of(w.dtype), w.directions, limits=LIMITS[arch])
            inputs = w.input_size if plan.multiplies_input(w.input_size) else OTHER_INPUTS
            gates = w.mode == "train" and plan.keeps_gates(w.steps, w.layers)
            keys[w.name] = plan, w.dtype, w.sequences == "resets", inputs, gates
        except PlanError as error:
            reasons[w.name] = str(error)
    compiled = dict.fromkeys(keys.values())
    text = lambda key: f"compiling {key[0].kind} H={key[0].hidden_size} B={key[0].batch} {key[1]} for sm_{arch}"
    for key in progress(compiled, text):
        plan, dtype, flagged, inputs, gates = key
        kernels = compile_plan(plan, dtype_of(dtype), arch, flagged=flagged, inputs=inputs, keep_gates=gates)
        compiled[key] = [next(read(kernel) for name, kernel in kernels.items() if name.startswith(which))
                         for which in ("forward", "backward")]
    return [Residency(w.name, w.dtype, keys[w.name][0], *compiled[keys[w.name]]) if w.name in keys else
            Residency(w.name, w.dtype, reason=reasons[w.name]) for w in workloads]


def table(found):
    """A Markdown table of ``Residency`` objects, then the reasons why some workloads have no plan."""
    header = ("workload", "type", "schedule", "programs x groups", "R planned", "R in registers", "R from L2",
              "registers", "shared", "spills", "barriers", "cycles a step")
    kib = lambda n: f"{n / 1024:.0f}"
    rows = []
    for f in found:
        if f.plan is None:
            rows.append((f.workload, f.dtype, "no plan") + ("",) * (len(header) - 3))
            continue
        both = lambda value, f=f: f"{value(f.forward)} / {value(f.backward)}"
        plans = [f.plan] if f.plan.backward is f.plan else [f.plan, f.plan.backward]
        each = lambda value, plans=plans: " / ".join(value(plan) for plan in plans)
        rows.append((f.workload, f.dtype, each(lambda p: p.kind),
                     each(lambda p: f"{p.programs} x {p.groups}" + f" x {p.directions}" * (p.directions > 1)),
                     each(lambda p: kib(p.held_bytes)), both(lambda r: kib(r.time_loop.held)),
                     each(lambda p: kib(p.streamed_bytes)), both(lambda r: r.registers), both(lambda r: kib(r.shared)),
                     both(lambda r: r.time_loop.spills), both(lambda r: r.time_loop.counts["BAR"]),
                     f"{step_cycles(f.plan, f.forward):.0f} / {step_cycles(f.plan.backward, f.backward):.0f}"))
    notes = [f"{f.workload}: {f.reason}" for f in found if f.plan is None]
    return "\n".join([markdown(header, rows)] + notes)


def show(workloads, arch=90):
    """Print the table of ``workloads``."""
    found = read_plans(workloads, arch)
    print(f"Plans compiled for sm_{arch} by Triton {triton.__version__}\n\n{table(found)}\n\n{LEGEND}")
    if ratios := model_ratios(found, arch):
        (least, low), (most, high) = (pick(ratios.items(), key=lambda item: item[1]) for pick in (min, max))
        print(f"\nThe cost model predicts {low:.2f} ({' '.join(least)}) to {high:.2f} ({' '.join(most)}) times these "
              "cycles, without the exchange and for one wave.")
