"""Times layers on a GPU side by side. A layer whose result is wrong is not timed."""
import dataclasses
import functools
import time

import torch
from triton_lstm.kernels.offline import compile_apart

import triton_lstm
from triton_lstm.check import TOLERANCE
from triton_lstm.plan import step_cycles

from .console import progress
from .correctness import dtype_of, error, exact_results, results
from .providers import Graph, Problem, Unavailable
from .rows import OURS, Row, Writer, load


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long one provider is timed on one case: until ``sample_ms`` milliseconds were timed, in ``least`` to ``most``
    calls. If a call takes longer than ``slow_ms``, two calls are enough."""
    sample_ms: float
    least: int = 5
    most: int = 100
    slow_ms: float = 1000


# An estimate, not measured: a case of ``record`` with five providers takes 1.5 s (0.1 s for the first call, 0.1 s for
# the check and ``sample_ms`` for each provider). So about 130 of the 238 cases fit into 200 s. The most important come
# first.
EFFORTS = {"quick": Effort(50), "record": Effort(80), "full": Effort(300)}


def saved_bytes(layer, x):
    """Bytes that a forward keeps for backward, besides weights, x and y.

    A storage that several tensors share counts once. cuDNN's reserve space is included, because torch saves it like any
    other tensor.
    """
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = layer(x)
    known = {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())}
    return sum(size for place, size in kept.items() if place not in known)


class Run:
    """One provider's layer on one problem."""

    def __init__(self, provider, make, problem):
        self.provider = provider
        self.layer = make(problem)
        case = problem.case
        self.layer.train(case.mode == "train")
        x, dy = problem.x, problem.dy
        if getattr(self.layer, "batch_first_memory", False):
            x, dy = (t if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy))
        self.x = x.detach().requires_grad_(dy is not None)
        self.dy = dy
        self.filled = (self.x, *self.layer.parameters()) if dy is not None else ()

    def results(self):
        """What the layer computes without dropout. (Different layers drop different elements.)"""
        dropout = getattr(self.layer, "dropout", 0)
        if dropout:
            self.layer.dropout = 0.
        try:
            return results(self.layer, self.x, self.dy)
        finally:
            if dropout:
                self.layer.dropout = dropout

    def clear(self):
        """Drop the gradients, like ``zero_grad``, so that the next call allocates new ones."""
        for tensor in self.filled:
            tensor.grad = None

    def __call__(self):
        if self.dy is not None:
            self.layer(self.x)[0].backward(self.dy)
        else:
            with torch.no_grad():
                self.layer(self.x)


def measure(case, providers, gpu, floors, environment, effort):
    """Yield the ``Row`` of each provider, all with the same weights and input. ``providers`` is {name: function of a
    ``Problem`` that makes the layer}.

    Providers are timed in rounds, with one call of each. Every other round is in the opposite order.
    """
    row = functools.partial(Row, case, environment=environment)
    try:
        problem = Problem.of(case, gpu.device)
        exact = exact_results(problem.weights, problem.x, problem.dy, problem.runs)
    except torch.OutOfMemoryError:
        for name in providers:
            yield row(name, status="the float64 reference does not fit in memory")
        return
    running = {}
    for name, make in providers.items():
        try:
            figures, run = _check(name, make, problem, exact, gpu)
        except Unavailable as reason:
            yield row(name, status=str(reason))
        except Exception as failure:                # the row says so, and the run goes on with the other providers
            yield row(name, status=" ".join(f"failed: {type(failure).__name__}: {failure}".split())[:200])
        else:
            if figures["status"] == "ok":
                running[name] = figures, run
            else:
                yield row(name, **figures)
    del exact
    samples = _take_turns({name: run for name, (_, run) in running.items()}, gpu, effort, case.mode == "stream")
    sm_mhz, memory_mhz = gpu.clocks() if running else (None, None)
    for name, (figures, run) in running.items():
        p20, median, p80 = torch.tensor(samples[name]).quantile(torch.tensor([.2, .5, .8])).tolist()
        if (plan := getattr(run.layer, "timed_plan", None)) is not None:
            floor_us, exchange_us = floors.step_us(plan, case, sm_mhz)
            cycles = case.layers * step_cycles(plan, gpu.multiprocessors, "forward", gpu.multiply_adds)
            if case.mode == "train":
                cycles += case.layers * step_cycles(plan.backward, gpu.multiprocessors, "backward", gpu.multiply_adds)
            figures.update(floor_us=floor_us, exchange_us=exchange_us, predicted_us=sm_mhz and cycles / sm_mhz,
                           plan=f"{plan.kind} {plan.programs} x {plan.groups}")
        yield row(name, **figures, ms_p20=p20, ms_median=median, ms_p80=p80, samples=len(samples[name]), sm_mhz=sm_mhz,
                  memory_mhz=memory_mhz, gemm_tflops=floors.gemm_tflops(case.dtype))


def _check(name, make, problem, exact, gpu):
    """(fields of ``Row`` that are known before timing, the provider's ``Run`` or None if its result is wrong)."""
    case = problem.case
    # torch's own switch decides whether products of fp32 are in TF32. By default it allows that for an LSTM.
    allowed = TOLERANCE["tf32" if case.dtype == "fp32" else case.dtype]
    before = time.perf_counter()
    run = Run(name, make, problem)
    found = run.results()
    gpu.synchronize()
    first_call_s, got = time.perf_counter() - before, error(found, exact)
    if not got <= allowed:
        return dict(status="wrong", error=got), None
    run.clear()
    figures = dict(status="ok", error=got, first_call_s=first_call_s)
    # A CUDA graph has memory of its own, which torch's statistics of a call do not include.
    if case.mode == "train" and not isinstance(run.layer, Graph):
        figures.update(saved_bytes=saved_bytes(run.layer, run.x), peak_bytes=gpu.peak_bytes(run))
        run.clear()
    return figures, run


def _take_turns(runs, gpu, effort, stream):
    """{name: milliseconds of each call}."""
    samples = {name: [] for name in runs}
    for run in runs.values():           # one more call that does not count, as warm-up
        gpu.sample(run, stream)
        run.clear()
    for turn in range(effort.most):
        waiting = [name for name, ms in samples.items()
                   if sum(ms) < (2 * effort.slow_ms if len(ms) < effort.least else effort.sample_ms)]
        if not waiting:
            break
        for name in waiting if turn % 2 == 0 else reversed(waiting):
            samples[name].append(gpu.sample(runs[name], stream))
            runs[name].clear()
    return samples


def compile_all(cases, limits, arch):
    """Compile the automatic plans of ``cases`` into Triton's cache, in parallel; returns the seconds it took.

    Otherwise a sweep would compile them one by one between timings.
    """
    began = time.monotonic()
    wanted = {}
    for case in cases:
        try:
            plan = triton_lstm.make_plan(case.batch, case.hidden_size, dtype_of(case.dtype), case.directions,
                                         limits=limits)
        except triton_lstm.PlanError:
            continue                    # its row will say why
        widths = {case.input_size, *[case.directions * case.hidden_size] * (case.layers > 1)}
        gates = case.mode == "train" and plan.keeps_gates(case.steps, case.layers)
        for inputs in {width if plan.multiplies_input(width) else 64 for width in widths}:
            options = dict(flagged=case.sequences != "padded", inputs=inputs, keep_gates=gates)
            wanted.setdefault((plan.compiled_as, case.dtype, *options.values()),
                              (plan, dtype_of(case.dtype), options))
    jobs = list(wanted.values())
    for _ in progress(compile_apart(jobs, arch), lambda _: "compiling", len(jobs)):
        pass                            # if a kernel does not compile, its row will say so
    return time.monotonic() - began


def run(path, cases, providers, gpu, floors, environment, effort, seconds=None):
    """Measure ``cases`` and write each row into the CSV file ``path`` at once; returns the exit code.

    If the file exists, rows are added to it, and what it has a row for is not measured again. No case is started after
    ``seconds``. The exit code is 1 if triton_lstm gave a wrong result or failed, 130 after an interrupt, else 0.
    """
    done = {(row.case, row.provider) for row in load(path)} if path.exists() else set()
    began, code, skipped = time.monotonic(), 0, 0
    with Writer(path) as file:
        try:
            for case in progress(cases):
                left = {name: make for name, make in providers.items() if (case, name) not in done}
                if seconds is not None and time.monotonic() - began > seconds:
                    skipped += 1
                elif left:
                    for row in measure(case, left, gpu, floors, environment, effort):
                        file.write(row)
                    gpu.release()
        except KeyboardInterrupt:
            code = 130
    if skipped:
        print(f"{skipped} of {len(cases)} cases were left out after {seconds:.0f} seconds; add --resume {path} to "
              "measure them")
    bad = [row for row in load(path) if row.status == "wrong" or row.status.startswith("failed")
           and row.provider.startswith(OURS)]
    return code or int(bool(bad))
