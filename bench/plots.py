"""The pictures of a run. Blue is ours, orange is cuDNN, grey is anything else.

The two hues differ in lightness: they are told apart in grey and by colour-blind eyes. Line styles and markers tell
types apart. The same rows always make the same file. Needs no torch; matplotlib is imported when a picture is drawn.
"""
import collections
import functools
import itertools
import math
import textwrap

from .rows import BASELINES, CUDNN, OURS, PACKED, RESET_LOOP, best_cudnn, geometric_mean, speedup, timed
from .workloads import WORKLOADS

BLUE, ORANGE, GREY, TEXT = "#0b4f8a", "#d97b00", "#7a7a7a", "#333333"
ABSENT = "#e4e4e4"                                          # a cell of a map without a time
MODES = {"forward": "forward", "train": "training", "stream": "one step a call"}
AXES = {"hidden_size": "hidden units H", "batch": "batch B", "steps": "steps T"}
TYPICAL = dict(hidden_size=512, batch=64, steps=128)        # where several lines show as much
# Curves of fp16 and bf16 often lie on each other: a wide pale line shows under thin dashes, a dot inside a square.
STYLES = {"fp16": dict(linestyle="-", linewidth=4, alpha=0.45, marker="o", markersize=4),
          "bf16": dict(linestyle="--", linewidth=1.3, marker="s", markersize=8, markerfacecolor="none"),
          "fp32": dict(linestyle=":", linewidth=1.6, marker="^", markersize=6)}
FONT = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 9,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
        "grid.color": "#e6e6e6", "hatch.linewidth": 0.8}


def colour(provider):
    """The hue of a provider. It is the same in every picture."""
    if provider.startswith(OURS):
        return BLUE
    return ORANGE if provider.startswith((CUDNN, "nn.LSTM", "torch.nn")) else GREY


def curve_style(provider, dtype):
    """How a curve looks. cuDNN's markers are larger: they show under ours where both are as fast."""
    style = dict(color=colour(provider), label=f"{provider} {dtype}", **STYLES[dtype])
    style["markersize"] += 3 * (provider != OURS)
    return style


def luminance(rgb):
    """Relative luminance of a colour, 0 (black) to 1 (white), as WCAG 2 defines it."""
    from matplotlib.colors import to_rgb
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(rgb)]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    """Contrast of two colours, 1 (the same) to 21 (black on white), as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _styled(draw):
    """``draw`` with the same fonts and lines everywhere, whatever a user's matplotlibrc says."""
    @functools.wraps(draw)
    def styled(*args):
        import matplotlib
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(FONT)
            return draw(*args)
    return styled


def _figure(width, height, title, rows=1, columns=1, dpi=120, **options):
    from matplotlib.figure import Figure  # without pyplot: draws with Agg, keeps no state
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.suptitle(_wrapped(title, 9 * width), x=0.01, ha="left", fontsize=12, weight="bold")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _wrapped(text, columns):
    return "\n".join(textwrap.wrap(text, int(columns)))


def _caption(figure, text, size=8):
    figure.supxlabel(_wrapped(text, 130 / size * figure.get_figwidth()), x=0.01, ha="left", fontsize=size)
    return figure


@_styled
def save(figure, path):
    """Write a picture into the file ``path``, which is returned."""
    figure.savefig(path, metadata={"Software": None})       # nothing in the file but what is drawn
    return path


def _distinct(rows, name, length=None):
    """A field of the environment, cut to ``length`` characters. Where rows differ, all of its values."""
    return " / ".join(dict.fromkeys(getattr(row.environment, name)[:length] for row in rows))


def _where(rows):
    """GPU and versions, for a caption."""
    text = f"{_distinct(rows, 'gpu')}, {_versions(rows)}."
    wrong = sum(row.status == "wrong" for row in rows)
    return text + f" {wrong} wrong results are left out." * bool(wrong)


def _versions(rows):
    of = functools.partial(_distinct, rows)
    return (f"torch {of('torch')}, cuDNN {of('cudnn')}, Triton {of('triton')}, commit {of('commit')}, "
            f"{of('date', 10)}")


def _ticks(axis, values):
    """A tick for each value of a logarithmic axis. A label that would touch the one of a larger value is left out."""
    labels, last = {}, math.inf
    for value in sorted(values, reverse=True):
        if math.log(last / value) > 0.12 * math.log(max(values) / min(values)):
            labels[value], last = str(value), value
    axis.set_ticks(values, [labels.get(value, "") for value in values])
    axis.set_tick_params(which="minor", length=0, labelbottom=False)


def _decimal_ticks(axis):
    """Plain numbers on a logarithmic axis: as many round ones as there is room for."""
    low, high = sorted(axis.get_view_interval())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [value for p in powers for f in factors if low <= (value := float(f"{f}e{p}")) <= high]
        if len(ticks) <= 9:
            break
    axis.set_ticks(ticks, [f"{tick:,.9g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _lines(axis, names):
    """A line for each name, the first at the top."""
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _second_column(panel, values, title):
    """A value for each line, to the right of the frame."""
    right = panel.secondary_yaxis("right")
    right.set_yticks(range(len(values)), values)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    right.set_ylabel(title)


def _legend_above(panel, entries):
    panel.legend(handles=entries, loc="lower right", bbox_to_anchor=(1, 1), ncols=min(4, len(entries)),
                 borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4)


def _mark(label, marker, color, **options):
    from matplotlib.lines import Line2D
    return Line2D([], [], linestyle="", marker=marker, color=color, label=label, **options)


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


@_styled
def throughput(rows):
    """Tokens a second over H, B and T, a row of panels for forward and one for training."""
    from matplotlib.lines import Line2D
    found = timed(rows)
    lines = {(mode, vary): line for mode in ("forward", "train") for vary in AXES if (line := _line(found, mode, vary))}
    if not lines:
        return None
    modes, varied = ([name for name in order if any(name in key for key in lines)] for order in (MODES, AXES))
    figure, axes = _figure(2.2 + 3.6 * len(varied), 1.3 + 3.6 * len(modes),
                           f"Throughput of one LSTM layer on {_distinct(rows, 'gpu')}", len(modes), len(varied),
                           sharey="row")
    entries = {}
    for (mode, vary), panel in zip(itertools.product(modes, varied), axes.flat):
        if (mode, vary) not in lines:
            panel.set_axis_off()
            continue
        cases, fixed = lines[mode, vary]
        for dtype in STYLES:
            chosen = sorted((c for c in cases if c.dtype == dtype), key=lambda c: getattr(c, vary))
            for provider in (CUDNN, OURS):
                points = [(getattr(c, vary), found[c][provider]) for c in chosen if provider in found[c]]
                if not points:
                    continue
                at, middle = [at for at, _ in points], [row.tokens_per_s / 1e6 for _, row in points]
                spread = [[abs(row.case.tokens / getattr(row, end) / 1e3 - row.tokens_per_s / 1e6) for _, row in points]
                          for end in ("ms_p80", "ms_p20")]
                style = curve_style(provider, dtype)
                panel.errorbar(at, middle, spread, fmt="none", ecolor=colour(provider), elinewidth=1, capsize=2)
                panel.plot(at, middle, **style)
                entries[provider, dtype] = Line2D([], [], **style)
        panel.set(xscale="log", yscale="log", xlabel=AXES[vary], title=f"{MODES[mode]}, {fixed}")
        panel.grid(which="major")
        _ticks(panel.xaxis, sorted({getattr(c, vary) for c in cases}))
    for line in axes:
        first = next(panel for panel in line if panel.axison)
        first.set_ylabel("throughput [million tokens per second]")
        first.tick_params(labelleft=True)
        _decimal_ticks(first.yaxis)
    figure.legend(handles=[entries[key] for provider in (OURS, CUDNN) for dtype in STYLES
                           if (key := (provider, dtype)) in entries], loc="outside right", handlelength=3.5)
    return _caption(figure, "As many inputs as units. Points are medians, bars go from 20 % to 80 %. fp32 multiplies "
                            "in TF32 as torch lets it. " + _where(rows))


def diverging():
    """The colour map of speed-ups: orange for losses, white where both are as fast, blue for wins."""
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("speedup", [ORANGE, "white", BLUE], N=257)   # odd: one is white


def around_one(ratios):
    """The norm of speed-ups: logarithmic and as far below 1 as above. It ends at a power of two from 2 to 8."""
    from matplotlib.colors import LogNorm
    most = max(abs(math.log2(ratio)) for ratio in ratios)
    limit = 2. ** min(max(math.ceil(most), 1), 3)
    return LogNorm(1 / limit, limit, clip=True)


def _short(ratio):
    """A ratio in at most three digits."""
    if ratio < 0.1:
        return f"{ratio:.2g}"
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


@_styled
def heat_map(rows):
    """Speed-up over cuDNN's best, a B x H map for each mode and type."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Polygon, Rectangle
    found = timed(rows)
    maps = {}
    for mode in ("forward", "train"):
        for dtype in STYLES:
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
    modes, dtypes = ([name for name in order if any(name in key for key in maps)] for order in (MODES, STYLES))
    norm, shades = around_one([ratio for _, cells in maps.values() for ratio in cells.values()]), diverging()
    width, height = 2.6 + len(dtypes) * (0.5 + 0.55 * len(sizes)), 2.4 + len(modes) * (0.5 + 0.36 * len(batches))
    figure, axes = _figure(width, height, f"Speed-up of {OURS} over cuDNN on {_distinct(rows, 'gpu')}", len(modes),
                           len(dtypes))
    for mode, line in zip(modes, axes):
        for dtype, panel in zip(dtypes, line):
            if (mode, dtype) not in maps:
                panel.set_axis_off()
                continue
            steps, cells = maps[mode, dtype]
            for (batch, size), ratio in cells.items():
                x, y = sizes.index(size), batches.index(batch)
                shade = shades(norm(ratio))
                ink = max(("black", "white"), key=lambda color, shade=shade: contrast(color, shade))
                panel.add_patch(Rectangle((x - .5, y - .5), 1, 1, facecolor=shade, edgecolor="#c8c8c8", linewidth=0.6))
                if ratio < 1:
                    panel.add_patch(Polygon([(x - .5, y + .5), (x - .28, y + .5), (x - .5, y + .2)], facecolor="black"))
                panel.text(x, y, _short(ratio), ha="center", va="center", color=ink)
            panel.set(xlim=(-.5, len(sizes) - .5), ylim=(-.5, len(batches) - .5), facecolor=ABSENT,
                      title=f"{MODES[mode]}, {dtype}, T = {steps}", xlabel=AXES["hidden_size"], ylabel=AXES["batch"])
            panel.set_xticks(range(len(sizes)), sizes)
            panel.set_yticks(range(len(batches)), batches)
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=axes, label="speed-up [times]", extend="both", aspect=25)
    powers = range(-round(math.log2(norm.vmax)), round(math.log2(norm.vmax)) + 1)
    bar.set_ticks([2. ** p for p in powers], labels=[f"{2 ** p}" if p >= 0 else f"1/{2 ** -p}" for p in powers])
    bar.set_ticks([], minor=True)
    bar.outline.set_visible(False)
    absent = any(len(cells) < len(sizes) * len(batches) for _, cells in maps.values())
    return _caption(figure, "One layer with as many inputs as units, against cuDNN's fastest no less exact type, with "
                            "CUDA graph where measured. Blue: ours is faster. Orange with a black corner: cuDNN is. "
                            + "Grey: not measured. " * absent + _where(rows))


def _named(rows):
    """(workload's case as its source runs it, {provider: row}) in the order of the table, where ours has a time."""
    found = timed(rows)
    return [(case, found[case]) for case in (w.case() for w in WORKLOADS) if OURS in found.get(case, {})]


def _by_speedup(rows):
    """``_named`` with the speed-up over what nn.LSTM's users run, the largest first. It is None where that has no time;
    those come last."""
    named = [(case, providers, speedup(providers, BASELINES[case.sequences])) for case, providers in _named(rows)]
    return sorted(named, key=lambda line: -math.inf if line[2] is None else -line[2])


def _name(case):
    return (f"{case.workload}, {case.dtype} {MODES[case.mode]}" + f", {case.sequences}" * (case.sequences != "padded"))


def _speedup_bars(panel, ratios, label, room):
    """Bars from 1, each in the hue of the faster. ``room`` is the share of the width that a label takes."""
    bars = panel.barh(range(len(ratios)), [ratio - 1 for ratio in ratios], left=1, height=0.72, edgecolor="white",
                      linewidth=0, color=[BLUE if ratio >= 1 else ORANGE for ratio in ratios])
    for n, (bar, ratio) in enumerate(zip(bars, ratios)):
        bar.set_hatch("" if ratio >= 1 else "////")
        side = 1 if ratio >= 1 else -1
        panel.annotate(label(ratio), (ratio, n), (4 * side, 0), textcoords="offset points", va="center_baseline",
                       ha="left" if side > 0 else "right")
    panel.axvline(1, color="black", linewidth=1)
    low, high = min(1, *ratios), max(2, *ratios)
    left = room if low < 1 else 0.01
    decades = math.log10(high / low) / (1 - left - room)
    panel.set(xscale="log", xlim=(low / 10 ** (left * decades), high * 10 ** (room * decades)))
    panel.grid(axis="x")
    _decimal_ticks(panel.xaxis)


def _winners(ratios):
    """Entries of a legend for ``_speedup_bars``. None are needed where ours is always the faster."""
    from matplotlib.patches import Patch
    if min(ratios) >= 1:
        return []
    return [Patch(color=BLUE, label=f"{OURS} is faster"),
            Patch(facecolor=ORANGE, edgecolor="white", linewidth=0, hatch="////", label="cuDNN is faster")]


@_styled
def hero(rows):
    """Speed-up of the published workloads over cuDNN in few words, for README. None for rows of several GPUs."""
    lines = [(case, ratio) for case, _, ratio in _by_speedup(rows) if ratio is not None]
    if not lines or len({row.environment.gpu for row in rows}) > 1:
        return None
    cases, ratios = zip(*lines)
    count = f"{len(WORKLOADS)}" if len(lines) == len(WORKLOADS) else f"{len(lines)} of {len(WORKLOADS)}"
    figure, axes = _figure(10, 5, f"LSTM layers of {count} published models: speed-up over cuDNN on "
                                  f"{_distinct(rows, 'gpu')}", dpi=160)
    panel = axes[0, 0]
    _speedup_bars(panel, ratios, _short, 0.06)
    _lines(panel, [case.workload + "*" * (case.sequences == "resets") for case in cases])
    others = [ratio for case, ratio in lines if case.sequences != "resets"]
    mean = f"geometric mean {_short(geometric_mean(ratios))}"
    if 0 < len(others) < len(lines):
        mean += f", without * {_short(geometric_mean(others))}"
    panel.set_xlabel(f"times as fast as torch.nn.LSTM with cuDNN ({mean})")
    if entries := _winners(ratios):
        _legend_above(panel, entries)
    note = "* resets inside a sequence: cuDNN is called for each step. " * (len(others) < len(lines))
    return _caption(figure, f"{note}{_versions(rows)}.", 9)


@_styled
def workloads(rows):
    """Speed-up of each named workload as a bar, losses as plain as wins."""
    lines = [(case, ratio) for case, _, ratio in _by_speedup(rows) if ratio is not None]
    if not lines:
        return None
    cases, ratios = zip(*lines)
    figure, axes = _figure(9, 1.9 + 0.26 * len(lines),
                           f"Speed-up of {OURS} over nn.LSTM (cuDNN) on {_distinct(rows, 'gpu')}")
    panel = axes[0, 0]
    _speedup_bars(panel, ratios, lambda ratio: f"{ratio:.2f}×", 0.12)
    _lines(panel, [_name(case) for case in cases])
    panel.set_xlabel("speed-up over nn.LSTM [times]")
    if entries := _winners(ratios):
        _legend_above(panel, entries)
    return _caption(figure, f"Layers of published models, each in its own type and mode, against {CUDNN} through "
                            f"nn.LSTM ({PACKED} for ragged batches, {RESET_LOOP} for resets). " + _where(rows))


@_styled
def floors(rows):
    """Microseconds of a step: ours beside the floor of its plan, cuDNN and whatever else was timed."""
    lines = [(case, providers) for case, providers, _ in _by_speedup(rows) if providers[OURS].floor_us]
    if not lines:
        return None
    figure, axes = _figure(9, 1.9 + 0.26 * len(lines), f"Time of a step on {_distinct(rows, 'gpu')}")
    panel = axes[0, 0]
    main = {OURS, *BASELINES.values()}
    others = sorted({name for _, providers in lines for name in providers} - main)
    marks = {name: dict(marker=marker, color=colour(name), markersize=5, markerfacecolor="none")
             for name, marker in zip(others, "^vs<>phd8" * len(others))}
    marks |= dict.fromkeys(BASELINES.values(), dict(marker="D", color=ORANGE, markersize=7))
    marks[OURS] = dict(marker="o", color=BLUE, markersize=6)
    for n, (_, providers) in enumerate(lines):
        ours = providers[OURS]
        panel.plot([ours.floor_us, ours.us_per_step], [n, n], color="#c4c4c4", linewidth=3, zorder=1)
        panel.plot(ours.floor_us, n, marker="|", color="black", markersize=10, markeredgewidth=1.5)
        for name in sorted(providers, key=lambda name: (name == OURS, name in main)):       # ours on top
            panel.plot(providers[name].us_per_step, n, linestyle="", zorder=2 + (name in main), **marks[name])
    panel.set(xscale="log", xlabel="time of a step [µs]")
    panel.grid(axis="x")
    _decimal_ticks(panel.xaxis)
    _lines(panel, [_name(case) for case, _ in lines])
    _second_column(panel, [f"{p[OURS].us_per_step / p[OURS].floor_us:.1f}×" for _, p in lines], "ours / floor")
    entries = [_mark("floor of the plan", "|", "black", markersize=10, markeredgewidth=1.5), _mark(OURS, **marks[OURS])]
    if any(not main.isdisjoint(set(p) - {OURS}) for _, p in lines):
        entries.append(_mark("nn.LSTM (cuDNN)", **marks[CUDNN]))
    _legend_above(panel, entries + [_mark(name, **marks[name]) for name in others])
    return _caption(figure, "All layers and the products before and after the loop are in it. The floor is arithmetic "
                            "and an exchange measured in the same run. Ordered by speed-up over nn.LSTM. "
                            + _where(rows))


@_styled
def memory(rows):
    """Peak memory of a training call, ours and cuDNN's."""
    lines = [(case, providers[OURS].peak_bytes, providers[theirs].peak_bytes) for case, providers in _named(rows)
             if (theirs := BASELINES[case.sequences]) in providers and providers[OURS].peak_bytes is not None
             and providers[theirs].peak_bytes]
    if not lines:
        return None
    lines.sort(key=lambda line: line[1] / line[2])
    figure, axes = _figure(9, 1.9 + 0.26 * len(lines), f"Peak memory of training on {_distinct(rows, 'gpu')}")
    panel = axes[0, 0]
    ours, theirs = dict(marker="o", color=BLUE, markersize=6), dict(marker="D", color=ORANGE, markersize=7)
    for n, (_, *both) in enumerate(lines):
        panel.plot([size / 2 ** 20 for size in both], [n, n], color="#c4c4c4", linewidth=3, zorder=1)
        for size, style in zip(both, (ours, theirs)):
            panel.plot(size / 2 ** 20, n, linestyle="", zorder=3 if style is ours else 2, **style)
    panel.set(xscale="log", xlabel="peak memory beyond weights and input [MiB]")
    panel.grid(axis="x")
    _decimal_ticks(panel.xaxis)
    _lines(panel, [_name(case) for case, *_ in lines])
    _second_column(panel, [f"{ours / theirs:.2f}×" for _, ours, theirs in lines], "ours / cuDNN's")
    _legend_above(panel, [_mark(OURS, **ours), _mark("nn.LSTM (cuDNN)", **theirs)])
    return _caption(figure, "What a forward and backward holds at once beyond weights and input. " + _where(rows))


PICTURES = dict(hero=hero, throughput=throughput, speedup=heat_map, workloads=workloads, floor=floors, memory=memory)


def draw(rows, out):
    """Draw every picture that ``rows`` have figures for into the folder ``out``; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    return [save(figure, out / f"{name}.png") for name, picture in PICTURES.items() if (figure := picture(rows))]


@_styled
def training(losses, rates, caption):
    """Loss curves {name: [loss]} over each other and, unless it is None, ``rates`` {name: characters/s} as bars."""
    figure, axes = _figure(9 if rates else 6.5, 4.5, "One character model, trained with each layer", 1,
                           2 if rates else 1)
    # the second is thin and dashed, so that the first shows under it
    styles = (dict(linewidth=4, alpha=0.6), dict(linewidth=1.6, linestyle="--"))
    for (name, curve), style in zip(losses.items(), styles):
        axes[0, 0].plot(range(1, len(curve) + 1), curve, label=name, color=colour(name), **style)
    axes[0, 0].set(xlabel="training step", ylabel="cross entropy [nats per character]")
    axes[0, 0].grid()
    axes[0, 0].legend(handlelength=3.5)
    if rates:
        bars = axes[0, 1].bar(list(rates), list(rates.values()), color=[colour(name) for name in rates], width=0.6)
        axes[0, 1].bar_label(bars, fmt="{:,.0f}", padding=2)
        axes[0, 1].yaxis.set_major_formatter("{x:,.0f}")
        axes[0, 1].set_ylabel("median training speed [characters per second]")
        axes[0, 1].margins(y=0.1)
    return _caption(figure, caption)
