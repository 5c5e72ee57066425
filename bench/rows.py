"""The rows of a sweep's CSV file, and figures that are computed from them. Needs no torch."""
import csv
import dataclasses
import math

from .workloads import Case

OURS, CUDNN, CUDNN_GRAPH = "triton_lstm", "cuDNN", "cuDNN graph"
PACKED, RESET_LOOP = "cuDNN packed", "cuDNN reset loop"
# what users of nn.LSTM run, by kind of sequences
BASELINES = {"padded": CUDNN, "ragged": PACKED, "resets": RESET_LOOP}


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and with which versions a row was measured. ``commit`` ends in "+" if files differed from that commit."""
    gpu: str
    torch: str
    cudnn: str
    triton: str
    commit: str
    date: str

    def __str__(self):
        return (f"{self.gpu}, torch {self.torch}, cuDNN {self.cudnn}, Triton {self.triton}, commit {self.commit}, "
                f"{self.date}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One provider on one case. Only a row with status "ok" has times.

    status        "ok", "wrong", "failed: ...", or the reason why the provider does not run the case
    error         largest relative error of any result or gradient against float64, in the Frobenius norm
    ms_*          quantiles of the time of a whole call
    samples       number of calls that were timed
    first_call_s  seconds of the first call, including compilation if the kernel was not compiled before
    peak_bytes    the most bytes that a training call holds at one time, besides weights and input
    saved_bytes   bytes that a training forward keeps for backward, besides weights, input and output
    floor_us      microseconds that a step of the plan takes at least (see ``floors.step_floor``)
    exchange_us   the part of floor_us that is the forward loop's exchange between programs, measured in the same run
    predicted_us  microseconds of a step, time loops only: ``triton_lstm.plan.step_cycles`` divided by sm_mhz
    gemm_tflops   what an 8192^3 product in this type reached in the same run
    sm_mhz, memory_mhz    clocks, read after the timing
    plan          kind, programs and groups of our plan
    """
    case: Case
    provider: str
    environment: Environment
    status: str
    error: float | None = None
    ms_p20: float | None = None
    ms_median: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    first_call_s: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    floor_us: float | None = None
    exchange_us: float | None = None
    predicted_us: float | None = None
    gemm_tflops: float | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    plan: str = ""

    @property
    def us_per_step(self):
        return self.ms_median and 1000 * self.ms_median / self.case.steps

    @property
    def tokens_per_s(self):
        return self.ms_median and 1000 * self.case.tokens / self.ms_median

    @property
    def tflops(self):
        return self.ms_median and self.case.flop / self.ms_median / 1e9

    @property
    def gemm_share(self):
        return self.tflops / self.gemm_tflops if self.tflops and self.gemm_tflops else None


_CASE = [f.name for f in dataclasses.fields(Case)]
_ENVIRONMENT = [f.name for f in dataclasses.fields(Environment)]
_FIGURES = [f for f in dataclasses.fields(Row) if f.name not in ("case", "environment")]
_DERIVED = ("us_per_step", "tokens_per_s", "tflops", "gemm_share")       # written for people, not read by ``load``
_TYPES = {"int": int, "float": float, "str": str}
COLUMNS = (*_CASE, *(f.name for f in _FIGURES), *_DERIVED, "cudnn_algorithm", *_ENVIRONMENT)


class Writer:
    """Appends rows to a CSV file and flushes after each, so that an interrupted run loses none."""

    def __init__(self, path):
        new = not path.exists()
        self._file = open(path, "a", newline="")
        self._csv = csv.writer(self._file)
        if new:
            self._csv.writerow(COLUMNS)

    def write(self, row):
        value = lambda name: getattr(row.case if name in (*_CASE, "cudnn_algorithm") else
                                     row.environment if name in _ENVIRONMENT else row, name)
        self._csv.writerow(f"{v:.6g}" if isinstance(v := value(name), float) else v for name in COLUMNS)
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def _read(kind, text):
    name = kind.__name__ if isinstance(kind, type) else str(kind).split(" ")[0]
    return None if text == "" and name != "str" else _TYPES[name](text)


def load(*paths):
    """The rows of CSV files that ``Writer`` wrote. ValueError if a file is something else."""
    rows = []
    for path in paths:
        with open(path, newline="") as file:
            lines = csv.DictReader(file)
            if missing := {*_CASE, *_ENVIRONMENT, *(f.name for f in _FIGURES)} - {*(lines.fieldnames or ())}:
                raise ValueError(f"{path} is no CSV file of this benchmark: it lacks {', '.join(sorted(missing))}")
            for line in lines:
                take = lambda fields, line=line: {f.name: _read(f.type, line[f.name]) for f in fields}
                rows.append(Row(Case(**take(dataclasses.fields(Case))),
                                environment=Environment(**take(dataclasses.fields(Environment))), **take(_FIGURES)))
    return rows


def timed(rows):
    """{case: {provider: row}} of the rows with status "ok"."""
    found = {}
    for row in rows:
        if row.status == "ok":
            found.setdefault(row.case, {})[row.provider] = row
    return found


def speedup(providers, over):
    """How many times faster triton_lstm is than the provider ``over``; None unless both have a time. ``providers`` is
    {provider: row}."""
    if OURS in providers and over in providers:
        return providers[over].ms_median / providers[OURS].ms_median
    return None


def best_cudnn(found, case):
    """The fastest row of cuDNN at the sizes of ``case``, with or without a CUDA graph, in its type or in one that is at
    least as exact. The two 16-bit types count as equally exact."""
    rows = [row for dtype in (("fp32",) if case.dtype == "fp32" else ("fp16", "bf16", "fp32"))
            for name, row in found.get(dataclasses.replace(case, dtype=dtype), {}).items()
            if name in (CUDNN, CUDNN_GRAPH, PACKED)]
    return min(rows, key=lambda row: row.ms_median, default=None)


def geometric_mean(values):
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
