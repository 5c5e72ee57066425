"""What a sweep measures, as rows of a CSV file, and what follows from them. Needs no torch."""
import csv
import dataclasses
import math

from .workloads import Case

OURS, CUDNN, CUDNN_GRAPH = "triton_lstm", "cuDNN", "cuDNN graph"
PACKED, RESET_LOOP = "cuDNN packed", "cuDNN reset loop"
# what nn.LSTM's users run for each kind of sequences
BASELINES = {"padded": CUDNN, "ragged": PACKED, "resets": RESET_LOOP}


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and with what a row was measured. ``commit`` of this repository ends in "+" where files differ from it."""
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
    """One provider on one case. Only a row of status "ok" has figures.

    status        "ok"; "wrong"; "failed: ..."; or why the provider does not run the case
    error         largest relative error of any result or gradient, in the norm, against float64
    ms_*          quantiles of the time of a whole call
    first_call_s  seconds of the first call, compilation included where nothing was compiled before
    peak_bytes    the most that a training call holds at once beyond weights and input
    saved_bytes   that a training forward keeps for backward beyond weights, input and output
    floor_us      microseconds of a step that the plan cannot go below (see ``floors.step_floor``)
    exchange_us   of it, the exchange between programs as measured in the same run
    predicted_us  microseconds of a step by ``triton_lstm.plan.step_cycles`` at sm_mhz: of the time loops only
    gemm_tflops   what an 8192^3 product reached in this type in the same run
    sm_mhz, memory_mhz    clocks as read after the timing
    plan          schedule and programs of ours
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
_DERIVED = ("us_per_step", "tokens_per_s", "tflops", "gemm_share")       # for readers of the file; not read again
_TYPES = {"int": int, "float": float, "str": str}
COLUMNS = (*_CASE, *(f.name for f in _FIGURES), *_DERIVED, "cudnn_algorithm", *_ENVIRONMENT)


class Writer:
    """Appends rows to a CSV file, which has each as soon as it is measured."""

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
    """The rows of CSV files that ``Writer`` wrote. ValueError names a file that is none."""
    rows = []
    for path in paths:
        with open(path, newline="") as file:
            lines = csv.DictReader(file)
            if missing := {*_CASE, *_ENVIRONMENT, *(f.name for f in _FIGURES)} - {*(lines.fieldnames or ())}:
                raise ValueError(f"{path} is no file of a sweep: it lacks {', '.join(sorted(missing))}")
            for line in lines:
                take = lambda fields, line=line: {f.name: _read(f.type, line[f.name]) for f in fields}
                rows.append(Row(Case(**take(dataclasses.fields(Case))),
                                environment=Environment(**take(dataclasses.fields(Environment))), **take(_FIGURES)))
    return rows


def timed(rows):
    """{case: {provider: row}} of the rows that have a time."""
    found = {}
    for row in rows:
        if row.status == "ok":
            found.setdefault(row.case, {})[row.provider] = row
    return found


def speedup(providers, over):
    """How many times faster than ``over`` ours is, for a {provider: row}; None unless both have a time."""
    if OURS in providers and over in providers:
        return providers[over].ms_median / providers[OURS].ms_median
    return None


def best_cudnn(found, case):
    """The fastest row of cuDNN on the sizes of ``case``, with or without a graph, in any type that is no less exact:
    either 16-bit type may stand for the other, fp32 for both."""
    rows = [row for dtype in (("fp32",) if case.dtype == "fp32" else ("fp16", "bf16", "fp32"))
            for name, row in found.get(dataclasses.replace(case, dtype=dtype), {}).items()
            if name in (CUDNN, CUDNN_GRAPH, PACKED)]
    return min(rows, key=lambda row: row.ms_median, default=None)


def geometric_mean(values):
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
