"""Compares the rows of a run with the targets of the package. Needs no torch."""
import dataclasses

from .console import markdown
from .rows import BASELINES, CUDNN, OURS, best_cudnn, geometric_mean, speedup, timed
from .workloads import WORKLOADS


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on ``values``, which are {case: ratio}: on their geometric mean or, if ``every``, on each ratio. These
    should be at least ``bound`` or, if ``at_most``, at most ``bound``."""
    name: str
    bound: float
    values: dict
    every: bool = False
    at_most: bool = False

    @property
    def worst(self):
        return (max if self.at_most else min)(self.values.values())

    @property
    def figure(self):
        return self.worst if self.every else geometric_mean(list(self.values.values()))

    @property
    def verdict(self):
        if not self.values:
            return "not measured"
        return "met" if (self.figure <= self.bound if self.at_most else self.figure >= self.bound) else "MISSED"


def _ratios(found, wanted, over=None):
    """{case: speed-up} of the cases for which ``wanted`` is true, over the provider ``over``. Without one it is the
    baseline of the case, which is what users of nn.LSTM run."""
    ratios = {case: speedup(providers, over or BASELINES[case.sequences]) for case, providers in found.items()
              if wanted(case)}
    return {case: ratio for case, ratio in ratios.items() if ratio is not None}


def targets(rows):
    """[Target], with values from ``rows``."""
    found = timed(rows)
    named = {w.case() for w in WORKLOADS}
    padded = lambda c: c.sequences == "padded"
    square = lambda c: c.workload == "grid" and padded(c)
    flashrnn = lambda c, mode: c.workload == "flashrnn_768" and c.dtype == "fp16" and c.mode == mode
    best = {case: best_cudnn(found, case).ms_median / providers[OURS].ms_median for case, providers in found.items()
            if square(case) and OURS in providers and best_cudnn(found, case)}
    memory = {case: providers[OURS].peak_bytes / providers[over].peak_bytes for case, providers in found.items()
              if case.mode == "train" and case.steps >= 64 and OURS in providers
              and (over := BASELINES[case.sequences]) in providers and providers[over].peak_bytes
              and providers[OURS].peak_bytes is not None}
    return [
        Target("named workloads, each in its type and mode", 2, _ratios(found, lambda c: c in named)),
        Target("named workloads except those with resets", 2,
               _ratios(found, lambda c: c in named and c.sequences != "resets")),
        Target("forward, fp16, H <= 256, B <= 64", 1.5, _ratios(
            found, lambda c: square(c) and (c.mode, c.dtype) == ("forward", "fp16") and c.hidden_size <= 256
            and c.batch <= 64, CUDNN)),
        Target("forward + backward, bf16, H 128 to 1024, B 16 to 128", 2.5, _ratios(
            found, lambda c: square(c) and (c.mode, c.dtype) == ("train", "bf16") and 128 <= c.hidden_size <= 1024
            and 16 <= c.batch <= 128, CUDNN)),
        Target("forward, fp16, H=768 B=16 T=1024", 1.2, _ratios(found, lambda c: flashrnn(c, "forward"), CUDNN)),
        Target("forward + backward, fp16, H=768 B=16 T=1024", 1.3,
               _ratios(found, lambda c: flashrnn(c, "train"), CUDNN)),
        Target("ragged batches, compared with packed ones of nn.LSTM", 5, _ratios(
            found, lambda c: c.sequences == "ragged" and c.workload == "grid")),
        Target("resets, compared with a loop over nn.LSTM", 20, _ratios(found, lambda c: c.sequences == "resets")),
        Target("peak memory of training, T >= 64, as a share of cuDNN's", 0.5, memory, at_most=True),
        Target("every size of the grid, compared with the best of cuDNN", 1, best, every=True),
    ]


def table(rows):
    """A Markdown table of the targets."""
    cells = []
    for target in targets(rows):
        bound = f"at {'most' if target.at_most else 'least'} {target.bound:g}x"
        figures = ("", "", "") if not target.values else (
            f"{target.figure:.2f}x", f"{target.worst:.2f}x, " + str(next(
                case for case, value in target.values.items() if value == target.worst)), len(target.values))
        cells.append((target.name, bound, *figures, target.verdict))
    return markdown(("target", "bound", "measured", "worst", "cases", "verdict"), cells)
