"""Two runs side by side, to judge a change. Needs no torch."""
from .console import markdown
from .rows import geometric_mean, timed


def compare(before, after):
    """A Markdown table of time ratios, before to after: above 1 the second is faster.

    The spread is what the ratio may be within the middle 60 % of both runs' samples; a ratio whose spread has 1 in it
    says nothing. Rows that only one run has are counted below.
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
    parts += [f"{provider}: {geometric_mean(values):.3f} in the geometric mean of {len(values)}"
              for provider, values in ratios.items()]
    parts += [f"only {which}: {count} rows" for which, count in
              (("before", len(old) - len(both)), ("after", len(new) - len(both))) if count]
    for rows in (before, after):
        parts += sorted({str(row.environment) for row in rows})
    return "\n\n".join(parts)
