"""Compares the times of two runs, to judge a change. Needs no torch."""
from .console import markdown
from .rows import geometric_mean, timed


def compare(before, after):
    """A Markdown table of time ratios, before / after. Above 1 the second run is faster.

    The spread is the range of the ratio over the middle 60 % of the samples of both runs. If it contains 1, the
    difference means nothing. The last lines count the rows that only one run has.
    """
    old, new = ({(case, name): row for case, providers in timed(rows).items() for name, row in providers.items()}
                for rows in (before, after))
    both = [key for key in old if key in new]
    lines, ratios = [], {}
    for case, provider in both:
        a, b = old[case, provider], new[case, provider]
        ratio, low, high = a.ms_median / b.ms_median, a.ms_p20 / b.ms_p80, a.ms_p80 / b.ms_p20
        ratios.setdefault(provider, []).append(ratio)
        verdict = "faster" if low > 1 else "slower" if high < 1 else ""
        lines.append((case, provider, f"{a.ms_median:.4g}", f"{b.ms_median:.4g}", f"{ratio:.3f}",
                      f"{low:.3f} to {high:.3f}", verdict))
    parts = [markdown(("case", "provider", "before, ms", "after, ms", "ratio", "spread", ""), lines)] if lines else []
    parts += [f"{provider}: {geometric_mean(values):.3f}, the geometric mean of {len(values)} ratios"
              for provider, values in ratios.items()]
    parts += [f"{count} rows are only in the run {which}" for which, count in
              (("before", len(old) - len(both)), ("after", len(new) - len(both))) if count]
    for rows in (before, after):
        parts += sorted({str(row.environment) for row in rows})
    return "\n\n".join(parts)
