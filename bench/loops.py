"""Times each time loop of every candidate plan of every workload by itself. ``fit`` fits the cost model to these times.

This process never uses the GPU. ``triton_lstm.runner`` gives each candidate to a worker process, which it kills if the
candidate hangs.
"""
import csv
import dataclasses
import functools
import itertools
import json
import os
import sys
import time

import torch
from triton_lstm.kernels.offline import compile_apart

from triton_lstm import PlanError, check, contest, make_plan, runner
from triton_lstm.check import TOLERANCE
from triton_lstm.kernels import sequence, waiting
from triton_lstm.plan import Limits, Plan, candidates, step_cycles

from .console import progress
from .correctness import dtype_of, error
from .workloads import WORKLOADS

STEPS = 64
SHARE, WAIT_LIMIT = 10., "2"        # seconds for one candidate, and seconds after which its kernel gives up waiting
FIELDS = ("workload", "dtype", "gpu", "triton", "loop", "kind", "plan", "chosen", "status", "error", "us_p20",
          "us_median", "us_p80", "exchange_us", "predicted_cycles", "predicted_us", "encoded", "limits")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One time loop, "forward" or "backward", of one plan for one workload.

    ``chosen`` says whether ``make_plan`` chooses this plan for this loop.
    """
    workload: str
    dtype: str
    loop: str
    chosen: bool
    plan: Plan

    def encode(self):
        return json.dumps({**dataclasses.asdict(self), "plan": self.plan.encode()})

    @staticmethod
    def decode(text):
        fields = json.loads(text)
        return Candidate(**{**fields, "plan": Plan.decode(fields["plan"])})

    @property
    def label(self):
        return f"{self.workload} {self.loop} {self.plan.variant}"


def all_candidates(limits):
    """The candidates of a device: first the chosen plans of all workloads, then the others, from each workload in
    turn."""
    chosen, others = [], []
    for w in WORKLOADS:
        options = dict(limits=limits, keep_every=STEPS)
        try:
            plan = make_plan(w.batch, w.hidden_size, dtype_of(w.dtype), w.directions, **options)
        except PlanError:
            continue
        chosen += [Candidate(w.name, w.dtype, "forward", True, plan),
                   Candidate(w.name, w.dtype, "backward", True, plan.backward)]
        # As ``candidates`` returns them: only a wgmma plan has a backward_plan.
        forward = plan if plan.kind == "wgmma" else dataclasses.replace(plan, backward_plan=None)
        own = dict(forward=forward, backward=plan.backward)
        rest = candidates(w.batch, w.hidden_size, dtype_of(w.dtype), w.directions, **options)
        others.append([Candidate(w.name, w.dtype, loop, False, other) for other in rest for loop in own
                       if other != own[loop] and not (loop == "backward" and other.kind == "wgmma")])
    return chosen + [c for turn in itertools.zip_longest(*others) for c in turn if c is not None]


def workload(name):
    return next(w for w in WORKLOADS if w.name == name)


@functools.cache
def problem(name, dtype, device):
    """(inputs of the layer, gradients of its outputs, exact results) of a workload's layer, over STEPS steps."""
    w = workload(name)
    D, B, H, I = w.directions, w.batch, w.hidden_size, w.input_size
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(I, H, bidirectional=D == 2, device=device, dtype=dtype_of(dtype))
    normal = lambda *shape: torch.randn(*shape, device=device, dtype=dtype_of(dtype))
    x, h0, c0 = normal(STEPS, B, I), normal(D, B, H), normal(D, B, H)
    gradients = normal(STEPS, B, D * H), normal(D, B, H), normal(D, B, H)
    parameters = [p.detach() for p in lstm.parameters()]
    both = lambda n: torch.stack(parameters[n::4])
    exact = lstm.double()
    leaves = [t.double().requires_grad_() for t in (x, h0, c0)]
    y, (h_n, c_n) = exact(leaves[0], tuple(leaves[1:]))
    found = torch.autograd.grad((y, h_n, c_n), [*leaves, *exact.parameters()], [g.double() for g in gradients])
    right = dict(y=y.detach(), h_n=h_n.detach(), c_n=c_n.detach(), dx=found[0], dh0=found[1], dc0=found[2],
                 dw=torch.stack(found[3::4]), dr=torch.stack(found[4::4]))
    return (x, both(0), both(1), both(2) + both(3), h0, c0), gradients, right


def measure(candidate, device, clock=contest.clock):
    """Compare a candidate with float64, then time its loop. Returns a dict with "status", "error" and, if the result is
    right, three quantiles of the microseconds of a step.

    Tests pass another ``clock``, to run this without a GPU.
    """
    inputs, gradients, right = problem(candidate.workload, candidate.dtype, device)
    plan = candidate.plan

    def call(timed=contest.plainly):
        run = contest.launcher_of(timed)
        if candidate.loop == "forward":
            y, h_n, c_n, *_ = sequence.forward(*inputs, None, plan, False, launcher=run)
            return dict(y=y, h_n=h_n, c_n=c_n)
        y = right["y"].to(inputs[0].dtype)
        kept = torch.empty(0, *inputs[-1].shape, device=device)
        dx, dw, dr, _, dh0, dc0 = sequence.backward(*gradients, *inputs, None, y, kept, None, plan, [True] * 6,
                                                    launcher=run)
        return dict(dx=dx, dw=dw, dr=dr, dh0=dh0, dc0=dc0)

    got = call()
    precision = {"tf32": "tf32", "tf32x3": "fp32"}.get(plan.precision, candidate.dtype)
    off = error(got, {name: right[name] for name in got})
    if not off <= TOLERANCE[precision]:
        return dict(status="wrong", error=off)
    us = torch.tensor(clock([call], device)[0]) / STEPS
    return dict(status="ok", error=off, **dict(zip(("us_p20", "us_median", "us_p80"),
                                                   us.quantile(torch.tensor([.2, .5, .8])).tolist())))


def work():
    """The program of a worker of ``runner``, on the GPU."""
    from . import floors, instrument
    device, floor = torch.device("cuda"), floors.Floors(instrument.Gpu())

    def answer(line):
        candidate = Candidate.decode(line)

        def compute():
            found = measure(candidate, device)
            if candidate.chosen and found["status"] == "ok":
                found["exchange_us"] = floor.exchange_us(candidate.plan, candidate.dtype, 200)
            return found
        return check.told(compute)
    runner.serve(answer)


def row(candidate, found, facts, triton_version):
    """The CSV row of a candidate: its plan, its prediction, and ``found``, which is the answer of its worker or,
    without one, of ``runner``."""
    plan = candidate.plan
    cycles = step_cycles(plan, facts["limits"]["multiprocessors"], candidate.loop, facts["limits"]["multiply_adds"])
    status = found.get("status") or ": ".join([found["outcome"], *filter(None, [
        found.get("record") or found.get("message")])])
    return dict(dict.fromkeys(FIELDS), workload=candidate.workload, dtype=candidate.dtype, gpu=facts["gpu"],
                triton=triton_version, loop=candidate.loop, kind=plan.variant, chosen=int(candidate.chosen),
                plan=f"{plan.programs} x {plan.groups} x {plan.tiles}, {plan.block_h} units, {plan.block_b} rows",
                predicted_cycles=round(cycles), predicted_us=cycles / facts["limits"]["mhz"], encoded=plan.encode(),
                limits=json.dumps(facts["limits"]),
                **{"status": status, **{name: value for name, value in found.items() if name in FIELDS}})


def run(path, seconds, facts, command=None, everything=None, share=SHARE):
    """Time the candidates and write each row into the CSV file ``path`` at once; returns the exit code."""
    import triton
    end = time.monotonic() + seconds
    limits = Limits(**facts["limits"])
    everything = all_candidates(limits) if everything is None else everything
    if command is None:
        jobs = {}
        for c in everything:
            inputs = workload(c.workload).input_size
            inputs = inputs if c.plan.multiplies_input(inputs) else 64
            jobs.setdefault((c.plan, c.dtype, inputs), (c.plan, dtype_of(c.dtype), dict(inputs=inputs)))
        major, minor = facts["capability"]
        compiling = compile_apart(list(jobs.values()), 10 * major + minor, 0.4 * seconds)
        for _ in progress(compiling, lambda _: "compiling", len(jobs)):
            pass                                    # if one does not compile, its row will say so
    bad = False
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        results = runner.run([(c, c.encode()) for c in everything], command or [sys.executable, "-m", "bench.loops"],
                             end - time.monotonic(), share, {**os.environ, waiting.VARIABLE: WAIT_LIMIT})
        for candidate, found, _ in progress(results, lambda result: result[0].label, len(everything)):
            line = row(candidate, found, facts, triton.__version__)
            bad = bad or line["status"] not in ("ok", "not reached")
            writer.writerow(line)
            file.flush()
    return int(bad)


if __name__ == "__main__":
    work()
