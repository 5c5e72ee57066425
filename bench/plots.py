"""The figures. matplotlib is imported only where one is drawn; figures go to files, never to a screen."""
import textwrap

MARKERS = {"fp16": "o", "bf16": "s", "fp32": "^"}


def _figure(width, height, rows, columns, **options):
    from matplotlib.figure import Figure  # without pyplot: draws with Agg, keeps no state
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure, path, caption):
    figure.supxlabel("\n".join(textwrap.wrap(caption, int(14 * figure.get_figwidth()))), fontsize=8)
    figure.savefig(path, dpi=120)


def sweep(rows, path):
    """Microseconds a step and speed-up over H, a column of panels for each mode and batch, a marker for each dtype."""
    from matplotlib.ticker import LogLocator

    from .sweep import OURS, THEIRS, pairs
    found = pairs(rows)
    panels = list(dict.fromkeys((row.mode, row.batch) for row in rows))
    sizes = sorted({row.hidden_size for row in rows})
    figure, axes = _figure(1.5 + 3.2 * len(panels), 7, 2, len(panels), sharex=True, sharey="row")
    for (mode, batch), (time, ratio) in zip(panels, axes.T):
        for dtype, marker in MARKERS.items():
            cases = sorted((c for c in found if (c.mode, c.batch, c.dtype) == (mode, batch, dtype)),
                           key=lambda c: c.hidden_size)
            for provider, style, fill in ((OURS, "-", "black"), (THEIRS, "--", "white")):
                timed = [found[c][provider] for c in cases if provider in found[c]]
                us = [row.us_per_step for row in timed]
                spread = [[1000 * abs(end - row.ms_median) / row.steps for end, row in zip(ends, timed)]
                          for ends in ([row.ms_p20 for row in timed], [row.ms_p80 for row in timed])]
                time.errorbar([row.hidden_size for row in timed], us, spread, color="black", linestyle=style,
                              marker=marker, markerfacecolor=fill, linewidth=1, capsize=2, label=f"{provider} {dtype}")
            both = [c for c in cases if OURS in found[c] and THEIRS in found[c]]
            ratio.plot([c.hidden_size for c in both],
                       [found[c][THEIRS].ms_median / found[c][OURS].ms_median for c in both], color="black",
                       marker=marker, linewidth=1, label=dtype)
        time.set_title({"forward": "forward", "train": "forward + backward"}[mode] + f", batch {batch}", fontsize=10)
        time.set(xscale="log", yscale="log")
        time.set_xticks(sizes, list(map(str, sizes)))
        time.minorticks_off()
        time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        time.yaxis.set_major_formatter("{x:g}")
        ratio.axhline(1, color="gray", linestyle=":")
        ratio.set_xlabel("hidden units H")
    axes[0, 0].set_ylabel("time of a step [µs]")
    axes[1, 0].set_ylabel(f"speed-up over {THEIRS} [times]")
    axes[1, 0].set_ylim(bottom=0)                   # once all is drawn: it also ends the search for the top
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    steps = ", ".join(map(str, sorted({row.steps for row in rows})))
    wrong = sum(row.status == "wrong" for row in rows)
    _save(figure, path, f"One layer with as many inputs as units, {steps} steps; median, bars from 20 % to 80 %; fp32 "
                        f"multiplies in TF32 as torch lets it. {rows[0].environment}."
                        + f" {wrong} wrong results are left out." * bool(wrong))


def training(losses, rates, path, caption):
    """Loss curves {name: [loss]} over each other and, unless it is None, ``rates`` {name: characters/s} as bars."""
    figure, axes = _figure(9 if rates else 6.5, 4.5, 1, 2 if rates else 1)
    styles = (dict(color="0.65", linewidth=4), dict(color="black", linewidth=1.2, linestyle="--"))
    for (name, curve), style in zip(losses.items(), styles):
        axes[0, 0].plot(range(1, len(curve) + 1), curve, label=name, **style)
    axes[0, 0].set(xlabel="training step", ylabel="cross entropy [nats per character]")
    axes[0, 0].legend()
    if rates:
        bars = axes[0, 1].bar(list(rates), list(rates.values()), color=("0.65", "white"), edgecolor="black", width=0.6)
        bars[1].set_hatch("//")
        axes[0, 1].bar_label(bars, fmt="{:,.0f}")
        axes[0, 1].yaxis.set_major_formatter("{x:,.0f}")
        axes[0, 1].set_ylabel("median training speed [characters per second]")
    _save(figure, path, caption)
