"""Times layers on a GPU against cuDNN; a result that is wrong gets no time."""
import csv
import dataclasses
import functools
import itertools

import torch
import triton
import triton.testing

import triton_lstm
from triton_lstm.op import automatic_plan

from . import plots
from .console import markdown, progress
from .correctness import TOLERANCE, error, exact_results, results
from .workloads import DTYPES

OURS, THEIRS = "triton_lstm", "cuDNN"
PROVIDERS = {OURS: triton_lstm.LSTM, THEIRS: torch.nn.LSTM}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer of ``hidden_size`` inputs and units; mode "forward", or "train" for forward and backward."""
    mode: str
    dtype: str
    batch: int
    hidden_size: int
    steps: int = 256

    def __str__(self):
        return f"{self.mode} {self.dtype} B={self.batch} H={self.hidden_size}"


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one provider; status "ok", "wrong", or why it does not run the case.

    Times are milliseconds of a whole call. Only an "ok" has them.
    """
    mode: str
    dtype: str
    batch: int
    hidden_size: int
    steps: int
    provider: str
    environment: str
    status: str
    error: float | None = None
    ms_p20: float | None = None
    ms_median: float | None = None
    ms_p80: float | None = None

    @property
    def case(self):
        return Case(self.mode, self.dtype, self.batch, self.hidden_size, self.steps)

    @property
    def us_per_step(self):
        return 1000 * self.ms_median / self.steps


CASES = tuple(itertools.starmap(Case, itertools.product(("forward", "train"), ("fp16", "bf16", "fp32"), (16, 64),
                                                        (64, 128, 256, 512, 1024))))


def environment():
    """The GPU and the versions that a timing depends on."""
    return (f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
            f"Triton {triton.__version__}, triton_lstm {triton_lstm.__version__}")


def time_gpu(function, tensors):
    """The 20, 50 and 80 % quantiles of a call's milliseconds. ``tensors`` lose their gradients before each call."""
    return triton.testing.do_bench(function, quantiles=(0.2, 0.5, 0.8), grad_to_none=tensors)


def measure(case, providers, device, timer, environment):
    """Yield the ``Row`` of each provider, all with the same weights and input."""
    dtype, size = DTYPES[case.dtype], case.hidden_size
    torch.manual_seed(0)
    x = torch.randn(case.steps, case.batch, size).to(device, dtype)
    dy = torch.randn_like(x) if case.mode == "train" else None
    weights = torch.nn.LSTM(size, size).to(device, dtype)
    exact = exact_results(weights, x, dy)
    # fp32 is left to torch's setting, and by default that lets an LSTM multiply in TF32
    allowed = TOLERANCE["tf32" if case.dtype == "fp32" else case.dtype]
    for provider, layer_class in providers.items():
        layer = layer_class(size, size).to(device, dtype)
        layer.load_state_dict(weights.state_dict())
        row = functools.partial(Row, *dataclasses.astuple(case), provider, environment)
        if reason := _refusal(layer, x):
            yield row(reason)
            continue
        got = error(results(layer, x, dy), exact)
        yield row("ok", got, *timer(*_timed(layer, x, dy))) if got <= allowed else row("wrong", got)


def _refusal(layer, x):
    """Why ``layer`` would leave x to torch's own LSTM, which would then be timed in its place; empty if it does not."""
    if isinstance(layer, triton_lstm.LSTM):
        try:
            automatic_plan(x.shape[1], layer.hidden_size, x.dtype, 1, x.device)
        except triton_lstm.PlanError as error:
            return str(error)
    return ""


def _timed(layer, x, dy):
    """What to time, and the tensors whose gradients it fills."""
    if dy is None:
        return torch.no_grad()(lambda: layer(x)), ()
    x = x.detach().requires_grad_()
    return lambda: layer(x)[0].backward(dy), (x, *layer.parameters())


def load(path):
    """The rows of a CSV file that ``run`` wrote."""
    number = lambda text: float(text) if text else None
    kinds = {int: int, str: str, float: float, float | None: number}
    with open(path, newline="") as file:
        return [Row(**{f.name: kinds[f.type](line[f.name]) for f in dataclasses.fields(Row)})
                for line in csv.DictReader(file)]


def pairs(rows):
    """{case: {provider: row}} of the rows that have a time."""
    found = {}
    for row in rows:
        if row.status == "ok":
            found.setdefault(row.case, {})[row.provider] = row
    return found


def summary(rows):
    """A Markdown table of microseconds a step, and a line for each row without a time."""
    cells = []
    for case, timed in pairs(rows).items():
        us = {provider: f"{row.us_per_step:.2f}" for provider, row in timed.items()}
        both = OURS in timed and THEIRS in timed
        cells.append((case.mode, case.dtype, case.batch, case.hidden_size, us.get(OURS, ""), us.get(THEIRS, ""),
                      f"{timed[THEIRS].ms_median / timed[OURS].ms_median:.2f}" if both else ""))
    header = ("mode", "type", "B", "H", f"{OURS} us/step", f"{THEIRS} us/step", "speed-up")
    untimed = [f"not timed: {row.provider}, {row.case}: " +
               (f"WRONG, relative error {row.error:.1e}" if row.status == "wrong" else row.status)
               for row in rows if row.status != "ok"]
    return "\n".join([markdown(header, cells)] + untimed)


def run(out, cases=CASES, providers=PROVIDERS, device="cuda", timer=time_gpu, environment=environment):
    """Measure ``cases`` into sweep.csv and sweep.png in the folder ``out``; returns the exit code: 1 if any is wrong.

    Each row is in the file as soon as it is measured, so that an interrupted run keeps it; the code is then 130.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, code = out / "sweep.csv", 0
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(f.name for f in dataclasses.fields(Row))
        here = environment()
        try:
            for case in progress(cases):
                for row in measure(case, providers, device, timer, here):
                    writer.writerow(dataclasses.astuple(row))
                    file.flush()
        except KeyboardInterrupt:
            code = 130
    rows = load(path)
    if rows:
        plots.sweep(rows, out / "sweep.png")
        print(f"{here}\n\n{summary(rows)}\n\nwrote {path} and {out / 'sweep.png'}")
    if code:
        print(f"interrupted after {len(rows)} measurements")
    return code or int(any(row.status == "wrong" for row in rows))
