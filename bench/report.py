"""The report of a run: tables of its rows. Needs no torch."""
from . import targets
from .console import markdown
from .rows import BASELINES, CUDNN, OURS, speedup, timed
from .workloads import WORKLOADS


def _ratio(value):
    return "" if value is None else f"{value:.2f}"


def speeds(rows):
    """A Markdown table with a line for each case that has a time, named workloads first."""
    found = timed(rows)
    names = [w.name for w in WORKLOADS]
    lines = []
    for case in sorted(found, key=lambda c: (names.index(c.workload) if c.workload in names else len(names))):
        providers, baseline = found[case], BASELINES[case.sequences]
        ours, theirs = providers.get(OURS), providers.get(baseline)
        us = lambda row: "" if row is None else f"{row.us_per_step:.2f}"
        of_ours = lambda name, ours=ours: _ratio(getattr(ours, name, None))
        others = ", ".join(f"{name} {row.us_per_step:.2f}" for name, row in providers.items()
                           if name not in (OURS, baseline))
        lines.append((case, us(ours), of_ours("floor_us"), of_ours("predicted_us"), us(theirs),
                      _ratio(speedup(providers, baseline)), case.cudnn_algorithm, others))
    return markdown(("case", "ours, us a step", "floor", "predicted", "nn.LSTM, us a step", "speed-up",
                     "cuDNN algorithm", "others, us a step"), lines)


def untimed(rows):
    """Why rows have no time: a line for each wrong or failed row, and a line for each other reason with the number of
    cases."""
    reasons = {}
    for row in rows:
        if row.status == "wrong":
            reasons[f"WRONG: {row.provider}, {row.case}: relative error {row.error:.1e}"] = 0
        elif row.status.startswith("failed"):
            reasons[f"{row.provider}, {row.case}: {row.status}"] = 0
        elif row.status != "ok":
            key = f"{row.provider}: {row.status}"
            reasons[key] = reasons.get(key, 0) + 1
    return "\n".join(f"- {reason}" + f" ({count} cases)" * bool(count) for reason, count in reasons.items())


def report(rows):
    """The whole report, as Markdown."""
    if not rows:
        return "Nothing was measured."
    environments = dict.fromkeys(map(str, {row.environment for row in rows}))
    counted = sum(row.status == "ok" for row in rows)
    parts = [f"{counted} timings. " + "; ".join(environments), "## Targets",
             f"How many times faster than nn.LSTM ({CUDNN}) in the same run: geometric mean and worst case.",
             targets.table(rows),
             "## Times", speeds(rows)]
    if reasons := untimed(rows):
        parts += ["## Not timed", reasons]
    return "\n\n".join(parts)
