"""The pictures, readable in black and white. matplotlib is imported only where one is drawn; needs no torch."""
import collections
import math
import textwrap

from .rows import BASELINES, CUDNN, OURS, PACKED, RESET_LOOP, best_cudnn, speedup, timed
from .workloads import WORKLOADS

MARKERS = {"fp16": "o", "bf16": "s", "fp32": "^"}
MODES = {"forward": "forward", "train": "forward + backward", "stream": "one step a call"}
AXES = {"hidden_size": "hidden units H", "batch": "batch B", "steps": "steps T"}
TYPICAL = dict(hidden_size=512, batch=64, steps=128)       # where several lines show as much


def _figure(width, height, rows=1, columns=1, **options):
    from matplotlib.figure import Figure  # without pyplot: draws with Agg, keeps no state
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure, path, caption):
    figure.supxlabel("\n".join(textwrap.wrap(caption, int(14 * figure.get_figwidth()))), fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _where(rows):
    """GPU and versions, for a caption."""
    e = rows[0].environment
    text = f"{e.gpu}, torch {e.torch}, cuDNN {e.cudnn}, Triton {e.triton}, commit {e.commit}, {e.date[:10]}."
    wrong = sum(row.status == "wrong" for row in rows)
    return text + f" {wrong} wrong results are left out." * bool(wrong)


def _ticks(axis, values):
    axis.set_ticks(values, list(map(str, values)))
    axis.set_tick_params(which="minor", length=0, labelbottom=False)


def _line(found, mode, vary):
    """The cases of the grid that differ in ``vary`` and type only, for the other two sizes that show most of it."""
    others = [name for name in AXES if name != vary]
    groups = collections.defaultdict(set)
    for case, providers in found.items():
        if (case.workload, case.mode, case.sequences) == ("grid", mode, "padded") and OURS in providers:
            groups[tuple(getattr(case, name) for name in others)].add(case)
    points = lambda cases: len({getattr(c, vary) for c in cases})
    typical = lambda sizes: sum(TYPICAL[name] == size for name, size in zip(others, sizes))
    fixed, cases = max(groups.items(), key=lambda item: (points(item[1]), len(item[1]), typical(item[0])),
                       default=((), ()))
    if points(cases) < 2:
        return None
    short = {"hidden_size": "H", "batch": "B", "steps": "T"}
    return cases, ", ".join(f"{short[name]} = {value}" for name, value in zip(others, fixed))


def throughput(rows, path):
    """Tokens a second over H, B and T, a row of panels for forward and one for training."""
    found = timed(rows)
    lines = {(mode, vary): line for mode in ("forward", "train") for vary in AXES if (line := _line(found, mode, vary))}
    if not lines:
        return None
    modes = list(dict.fromkeys(mode for mode, _ in lines))
    figure, axes = _figure(13, 1 + 4 * len(modes), len(modes), 3, sharey="row")
    for (mode, vary), panel in ((key, axes[modes.index(key[0]), list(AXES).index(key[1])])
                                for key in [(m, v) for m in modes for v in AXES]):
        if (mode, vary) not in lines:
            panel.set_axis_off()
            continue
        cases, fixed = lines[mode, vary]
        for dtype, marker in MARKERS.items():
            chosen = sorted((c for c in cases if c.dtype == dtype), key=lambda c: getattr(c, vary))
            for provider, style, fill in ((OURS, "-", "black"), (CUDNN, "--", "white")):
                points = [(getattr(c, vary), found[c][provider]) for c in chosen if provider in found[c]]
                if not points:
                    continue
                middle = [row.tokens_per_s for _, row in points]
                spread = [[abs(1000 * row.case.tokens / getattr(row, end) - row.tokens_per_s) for _, row in points]
                          for end in ("ms_p80", "ms_p20")]
                panel.errorbar([at for at, _ in points], middle, spread, color="black", linestyle=style, marker=marker,
                               markerfacecolor=fill, linewidth=1, capsize=2, label=f"{provider} {dtype}")
        panel.set(xscale="log", yscale="log", xlabel=AXES[vary], title=f"{MODES[mode]}, {fixed}")
        panel.grid(which="major", color="0.9")
        _ticks(panel.xaxis, sorted({getattr(c, vary) for c in cases}))
        panel.legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel("throughput [tokens per second]")
    return _save(figure, path, "One layer with as many inputs as units; median, bars from 20 % to 80 %; fp32 "
                               "multiplies in TF32 as torch lets it. " + _where(rows))


def heat_map(rows, path):
    """Speed-up over cuDNN's best, a B x H map for each mode and type."""
    from matplotlib.patches import Rectangle
    found = timed(rows)
    maps = {}
    for mode in ("forward", "train"):
        for dtype in MARKERS:
            by_steps = collections.defaultdict(dict)
            for case, providers in found.items():
                best = best_cudnn(found, case)
                if ((case.workload, case.mode, case.dtype, case.sequences) == ("grid", mode, dtype, "padded")
                        and OURS in providers and best):
                    by_steps[case.steps][case.batch, case.hidden_size] = best.ms_median / providers[OURS].ms_median
            steps, cells = max(by_steps.items(), key=lambda item: len(item[1]), default=(None, {}))
            if len(cells) > 1:
                maps[mode, dtype] = steps, cells
    if not maps:
        return None
    batches, sizes = (sorted({key[n] for _, cells in maps.values() for key in cells}) for n in (0, 1))
    columns = min(len(maps), 3)
    lines = -(-len(maps) // columns)
    figure, axes = _figure(1 + columns * (1.2 + 0.62 * len(sizes)), 1.2 + lines * (1.3 + 0.4 * len(batches)), lines,
                           columns)
    for panel in axes.flat[len(maps):]:
        panel.set_axis_off()
    for ((mode, dtype), (steps, cells)), panel in zip(maps.items(), axes.flat):
        for (batch, size), ratio in cells.items():
            at = sizes.index(size), batches.index(batch)
            shade = 1 - 0.2 * min(abs(math.log2(ratio)), 3)     # white where both are as fast
            panel.add_patch(Rectangle((at[0] - .5, at[1] - .5), 1, 1, facecolor=str(shade), edgecolor="white",
                                      hatch="///" if ratio < 1 else None))
            panel.text(*at, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", ha="center", va="center", fontsize=8,
                       weight="bold" if ratio < 1 else "normal", bbox=dict(boxstyle="square,pad=0.1", lw=0, fc="white",
                                                                            alpha=0.7))
        panel.set(xlim=(-.5, len(sizes) - .5), ylim=(-.5, len(batches) - .5), xlabel=AXES["hidden_size"],
                  ylabel=AXES["batch"])
        panel.set_title(f"{MODES[mode]}, {dtype}, T = {steps}", fontsize=10)
        panel.set_xticks(range(len(sizes)), sizes)
        panel.set_yticks(range(len(batches)), batches)
    return _save(figure, path, f"Speed-up of {OURS} over cuDNN's fastest no less exact type, with CUDA graph where "
                               "measured; hatched and bold: slower. " + _where(rows))


def _named(rows):
    """(workload's case as its source runs it, {provider: row}) in the order of the table, where ours has a time."""
    found = timed(rows)
    return [(case, found[case]) for case in (w.case() for w in WORKLOADS) if OURS in found.get(case, {})]


def _name(case):
    return f"{case.workload}\n{case.dtype}, {MODES[case.mode]}" + f", {case.sequences}" * (case.sequences != "padded")


def workloads(rows, path):
    """Speed-up of each named workload as a bar, losses as plain as wins."""
    bars = [(case, ratio) for case, providers in _named(rows)
            if (ratio := speedup(providers, BASELINES[case.sequences])) is not None]
    if not bars:
        return None
    figure, axes = _figure(9, 1.5 + 0.42 * len(bars))
    panel, low = axes[0, 0], min(1, *(ratio for _, ratio in bars))
    drawn = panel.barh(range(len(bars)), [ratio - 1 for _, ratio in bars], left=1, edgecolor="black",
                       color=["0.6" if ratio >= 1 else "white" for _, ratio in bars])
    for patch, (_, ratio) in zip(drawn, bars):
        patch.set_hatch("" if ratio >= 1 else "///")
    for n, (_, ratio) in enumerate(bars):
        panel.annotate(f" {ratio:.2f} ", (max(ratio, 1), n), va="center", fontsize=8)
    panel.axvline(1, color="black", linewidth=1)
    panel.set(xscale="log", xlim=(low / 1.3, max(2, *(ratio for _, ratio in bars)) * 1.4),
              xlabel="speed-up over nn.LSTM [times]; hatched: slower")
    panel.set_yticks(range(len(bars)), [_name(case) for case, _ in bars], fontsize=7)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 1.3 <= t <= panel.get_xlim()[1]]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panel.set_xticks([], minor=True)
    return _save(figure, path, f"Layers of published models, each in its own type and mode, against {CUDNN} through "
                               f"nn.LSTM ({PACKED} for ragged batches, {RESET_LOOP} for resets). " + _where(rows))


def floors(rows, path):
    """Microseconds of a step: ours beside the floor of its plan, and cuDNN."""
    lines = [(case, providers) for case, providers in _named(rows) if providers[OURS].floor_us]
    if not lines:
        return None
    figure, axes = _figure(9, 1.5 + 0.42 * len(lines))
    panel = axes[0, 0]
    for n, (case, providers) in enumerate(lines):
        ours, theirs = providers[OURS], providers.get(BASELINES[case.sequences])
        panel.plot([ours.floor_us, ours.us_per_step], [n, n], color="0.6", linewidth=3, zorder=1)
        for value, marker, fill, name in ((ours.floor_us, "|", "black", "floor of the plan"),
                                          (ours.us_per_step, "o", "black", OURS),
                                          (theirs and theirs.us_per_step, "D", "white", "nn.LSTM")):
            if value:
                panel.plot(value, n, marker, color="black", markerfacecolor=fill, markersize=10 if marker == "|" else 6,
                           label=name if n == 0 else None, zorder=2)
    panel.set(xscale="log", xlabel="time of a step [µs]")
    panel.set_yticks(range(len(lines)), [_name(case) for case, _ in lines], fontsize=7)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    panel.grid(axis="x", which="both", color="0.9")
    panel.legend(fontsize=8)
    return _save(figure, path, "A step's time, all layers and the products before and after the loop included; the "
                               "floor is arithmetic and an exchange measured in the same run. " + _where(rows))


def memory(rows, path):
    """Peak memory of a training call as bars."""
    bars = [(case, providers[OURS], providers[BASELINES[case.sequences]]) for case, providers in _named(rows)
            if BASELINES[case.sequences] in providers and providers[OURS].peak_bytes is not None
            and providers[BASELINES[case.sequences]].peak_bytes]
    if not bars:
        return None
    figure, axes = _figure(9, 1.5 + 0.55 * len(bars))
    panel = axes[0, 0]
    for shift, which, color, hatch, name in ((-0.2, 1, "0.6", "", OURS), (0.2, 2, "white", "///", "nn.LSTM")):
        panel.barh([n + shift for n in range(len(bars))], [bar[which].peak_bytes / 2 ** 20 for bar in bars], 0.38,
                   color=color, hatch=hatch, edgecolor="black", label=name)
    for n, (_, ours, theirs) in enumerate(bars):
        panel.annotate(f" {ours.peak_bytes / theirs.peak_bytes:.2f}x", (ours.peak_bytes / 2 ** 20, n - 0.2),
                       va="center", fontsize=8)
    panel.set(xscale="log", xlabel="peak memory beyond weights and input [MiB]")
    panel.set_yticks(range(len(bars)), [_name(case) for case, *_ in bars], fontsize=7)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    panel.legend(fontsize=8)
    return _save(figure, path, "What a forward and backward holds at once beyond weights and input. " + _where(rows))


PICTURES = dict(throughput=throughput, speedup=heat_map, workloads=workloads, floor=floors, memory=memory)


def draw(rows, out):
    """Draw every picture that ``rows`` have figures for into the folder ``out``; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    return [path for name, picture in PICTURES.items() if (path := picture(rows, out / f"{name}.png"))]


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
