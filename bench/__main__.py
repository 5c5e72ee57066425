"""Command line of the benchmark. torch is imported only by what computes: plots and comparisons need none."""
import argparse
import os
import pathlib
import subprocess
import sys

from .workloads import DTYPES, MODES, WORKLOADS

DESCRIPTION = """\
Benchmark of triton_lstm.

With no command, on a GPU: times triton_lstm.LSTM side by side with cuDNN (torch.nn.LSTM) and with what rivals are
installed, over the layers of published models and a grid of sizes. Each result is checked against float64 first, and
a wrong one gets no time. Writes a CSV file, pictures and a report. Without a GPU nothing is timed: the kernels are
checked in Triton's interpreter (as `python -m triton_lstm check` does), then come the table of `residency` and the
pictures of recorded runs. The exit code is 1 if a result is wrong."""

PROVIDERS = """\
providers:
  triton_lstm            ours, by its automatic plan
  triton_lstm SCHEDULE   ours, by one schedule (not by default)
  triton_lstm packed     ours on packed sequences, for ragged batches
  triton_lstm graph      ours, replayed from a CUDA graph
  cuDNN                  torch.nn.LSTM, weights flattened, TF32 as torch allows it
  cuDNN graph            the same from a CUDA graph
  cuDNN packed           for ragged batches
  cuDNN reset loop       one call a step, for resets
  compiled loop          a Python loop over one compiled step (not by default)
  TorchRL, FlashRNN      their Triton kernels, where installed"""

TEXTS = dict(
    residency="""\
Compiles the plan of every workload, reads the machine code of its time loops, and prints a Markdown
table: where R lives, registers, spills, barriers, a bound of the cycles of a step. Needs no GPU.""",
    train="""\
Trains a character model on the sources of Python's standard library with torch's LSTM and with ours,
from the same weights on the same batches, and draws both loss curves and speeds into train.png.
Without a GPU the kernels run in Triton's interpreter, at tiny sizes and with no speeds. In 16-bit types
the optimizer keeps fp32 copies of the weights; in fp16 the loss is scaled.""",
    plot="""\
Draws the pictures and the report of a run anew from its CSV files; needs no GPU and no torch. A folder
stands for its newest file; with none named, the newest recorded run of each GPU is drawn.""",
    compare="""\
Ratios of the times of two runs, with their spread: did a change help? Needs no GPU and no torch.""",
    verify="""\
Two calls for whoever gets a GPU for a while, of at most five minutes each. first: every kernel against float64
(`python -m triton_lstm check`, 90 s), every candidate plan's loops (`loops`, 140 s), compute-sanitizer and ncu where
they are. record: the GPU tests that matter most (60 s), the sweep of `--record` (200 s and compiling), pictures, the
other GPU tests. Each part is bounded in time, one that fails does not keep the others from running, and at most 8
files are left, report.md first.""",
    loops="""\
Times every candidate plan of the workloads, each time loop by itself, into a CSV file; a candidate that hangs is
killed.""",
    fit="""\
Fits the constants of the plans' cost model to the CSV file of `loops`, prints old, new, how far they are off, and which
plans would change. Needs no GPU and writes nothing.""")

RESULTS = pathlib.Path(__file__).parent / "results"


def positive(text):
    """An argument that must be a positive integer."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser():
    """The command line."""
    options = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    root = argparse.ArgumentParser("python -m bench", description=DESCRIPTION, epilog=PROVIDERS, **options)
    out = dict(type=pathlib.Path, metavar="FOLDER")
    root.add_argument("--out", help="where results go (default: bench/results/<gpu> for a sweep, else results)", **out)
    amount = root.add_mutually_exclusive_group()
    amount.add_argument("--quick", dest="amount", action="store_const", const="quick", help="under two minutes")
    amount.add_argument("--record", dest="amount", action="store_const", const="record",
                        help="what README shows: as much of it as 200 s hold, after compiling (default)")
    amount.add_argument("--full", dest="amount", action="store_const", const="full",
                        help="every size of the grid; hours")
    root.add_argument("--resume", type=pathlib.Path, metavar="CSV", help="go on with this file of an earlier run")
    names = [*(w.name for w in WORKLOADS), "grid"]
    for name, choices in (("workload", names), ("dtype", list(DTYPES)), ("mode", list(MODES))):
        root.add_argument(f"--{name}", action="append", metavar="NAME", choices=choices,
                          help=f"only this; may be repeated: {', '.join(choices)}")
    root.add_argument("--provider", action="append", metavar="NAME", help="only this; may be repeated; see below")
    commands = root.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    def command(name, summary, epilog=None):
        p = commands.add_parser(name, help=summary, description=TEXTS[name], **options)
        if name not in ("residency", "compare", "loops", "fit"):
            p.add_argument("--out", default=argparse.SUPPRESS, help="where results go (default: results)", **out)
        return p

    p = command("residency", "where R lives and what a step costs, from machine code")
    p.add_argument("--arch", type=int, default=90, choices=(80, 90, 100), help="compute capability (default: 90)")
    p.add_argument("--workload", nargs="+", metavar="NAME", default=names[:-1], choices=names[:-1], dest="only",
                   help="only these, of " + ", ".join(names[:-1]))
    p = command("train", "a character model with torch's LSTM and ours side by side")
    for name, meaning, default in (("batch", "sequences in a batch", "64 on a GPU, 8 without"),
                                   ("sequence", "characters in a sequence", "128, 16"),
                                   ("hidden", "units of the model", "512, 32"), ("steps", "training steps", "300, 40")):
        p.add_argument(f"--{name}", type=positive, metavar="N", help=f"{meaning} (default: {default})")
    p.add_argument("--layers", type=positive, default=1, metavar="N", help="of the LSTM (default: 1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the whole model (default: fp32)",
                   dest="model_dtype")
    p = command("plot", "draw a run's pictures from its CSV files")
    p.add_argument("files", nargs="*", type=pathlib.Path, metavar="CSV", help="files or folders")
    p = command("compare", "two runs' ratios, with their spread")
    p.add_argument("files", nargs=2, type=pathlib.Path, metavar="CSV", help="before, after")
    p = command("loops", "every candidate plan's time loops, for `fit`")
    p.add_argument("--seconds", type=positive, default=140, metavar="N", help="for all of it (default: 140)")
    p.add_argument("--csv", type=pathlib.Path, default=pathlib.Path("results/loops.csv"), metavar="FILE",
                   help="where rows go (default: results/loops.csv)")
    p.add_argument("--list", action="store_true", help="list the candidates of an H100 and time none")
    p = command("fit", "the cost model's constants from a CSV file of `loops`")
    p.add_argument("files", nargs=1, type=pathlib.Path, metavar="CSV", help="of `loops`")
    p = command("verify", "first or record: two calls of five minutes on a GPU")
    p.add_argument("call", choices=("first", "record"), help="which of the two")
    p.add_argument("--triton", type=pathlib.Path, metavar="FOLDER", help="with a second Triton, to put on the path")
    return root


def run_in_interpreter(arguments):
    """This program anew, with Triton's interpreter on, which triton.jit decides at import; returns the exit code."""
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen([sys.executable, "-m", "bench", *arguments],
                             env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:       # reached the child as well, which puts its results away first
            pass


def newest(folder):
    """The newest CSV file of a folder, None if it has none."""
    return max(folder.glob("*.csv"), key=lambda path: (path.stat().st_mtime, path.name), default=None)


def plot(files, out):
    """Draw and report ``files``, folders for their newest, into ``out``; with none, each recorded run into a folder."""
    from . import plots, report, rows
    if not files:
        recorded = [(newest(folder), out / folder.name) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()
                    and newest(folder)]
        if not recorded:
            print("No run on a GPU is recorded: there is nothing to draw.")
        return [plot([file], where) for file, where in recorded]
    found = [newest(path) if path.is_dir() else path for path in files]
    if None in found:
        sys.exit(f"no CSV file in {files[found.index(None)]}")
    try:
        measured = rows.load(*found)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    pictures = plots.draw(measured, out)
    text = report.report(measured)
    (out / "report.md").write_text("# Benchmark\n\n" + text + "\n" + "".join(f"\n![{p.stem}]({p.name})\n"
                                                                             for p in pictures))
    print(text + "\n\nwrote " + ", ".join(str(path) for path in [*pictures, out / "report.md"]))
    return out


def sweep(args):
    """Time the chosen cases on this GPU; returns the exit code."""
    import torch

    from triton_lstm.plan import Limits, make_plan

    from . import floors, instrument, providers, workloads
    from . import sweep as sweeping
    amount = args.amount or "record"
    cases = [case for case in getattr(workloads, amount)() if (not args.workload or case.workload in args.workload)
             and (not args.dtype or case.dtype in args.dtype) and (not args.mode or case.mode in args.mode)]
    if unknown := set(args.provider or ()) - set(providers.PROVIDERS):
        sys.exit(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(providers.PROVIDERS)}")
    default = (("triton_lstm", "cuDNN", "cuDNN packed", "cuDNN reset loop") if amount == "quick" else
               providers.COMPARED if amount == "record" else tuple(providers.PROVIDERS))
    chosen = {name: providers.PROVIDERS[name] for name in args.provider or default}
    here = instrument.environment()
    out = args.out or RESULTS / here.gpu.lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    path = args.resume or out / f"{here.date.replace(':', '-')}-{here.commit}.csv"
    print(f"{here}\n{len(cases)} cases, {len(chosen)} providers, into {path}", flush=True)
    seconds = dict(quick=100, record=200, full=None)[amount]
    major, minor = torch.cuda.get_device_capability()
    compiling_s = sweeping.compile_all(cases, Limits.of(torch.device("cuda")), 10 * major + minor)
    gpu = instrument.Gpu()
    floor = floors.Floors(gpu)
    plans = [make_plan(16, 16 * n, torch.bfloat16, schedule="grid", limits=floors.PORTABLE) for n in (2, 8, 32, 64)]
    print(f"launch {floor.launch_us():.2f} us, exchange between 2 to 64 programs "
          + ", ".join(f"{floor.exchange_us(plan, 'bf16'):.2f}" for plan in plans) + " us, GEMM "
          + ", ".join(f"{name} {floor.gemm_tflops(name):.0f}" for name in DTYPES) + " TFLOP/s", flush=True)
    code = sweeping.run(path, cases, chosen, gpu, floor, here, sweeping.EFFORTS[amount],
                        seconds and (seconds if amount == "record" else seconds - compiling_s))
    plot([path], out)
    return code


def time_loops(loops, args):
    """The command ``loops``; returns the exit code."""
    from triton_lstm.plan import H200
    if args.list:
        print("\n".join(candidate.label for candidate in loops.all_candidates(H200)))
        return 0
    from triton_lstm.check import ask_facts
    if (facts := ask_facts())["gpu"] is None:
        print("No GPU here: nothing is timed. --list lists the candidates.")
        return 0
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    return loops.run(args.csv, args.seconds, facts)


def main(arguments=None):
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    out = args.out or pathlib.Path("results")
    if args.command == "plot":
        plot(args.files, out)
        return 0
    if args.command == "compare":
        from . import compare, rows
        print(compare.compare(*(rows.load(path) for path in args.files)))
        return 0
    if args.command == "verify":
        from . import verify
        return verify.verify(out.resolve(), verify.CALLS[args.call](out.resolve(), args.triton))

    import warnings

    import torch
    from triton_lstm.kernels.precision import INTERPRET

    from triton_lstm.check import child

    from . import residency, train
    if args.command == "fit":
        from . import fit
        return fit.show(args.files[0])
    if args.command == "loops":
        from . import loops
        return time_loops(loops, args)
    interpreted, gpu = INTERPRET, torch.cuda.is_available()
    if interpreted and args.command in (None, "residency"):
        sys.exit("unset TRITON_INTERPRET: this compiles kernels")
    # where ours steps aside for torch's LSTM there is nothing to compare
    warnings.filterwarnings("error", "triton_lstm.LSTM uses torch's own LSTM")
    if args.command == "residency":
        residency.show([w for w in WORKLOADS if w.name in args.only], args.arch)
        return 0
    if args.command == "train":
        if not interpreted and not gpu:
            return run_in_interpreter(arguments)
        return train.run(out, train.chosen(args, interpreted), args.layers, args.seed, args.model_dtype, interpreted)
    if gpu:
        return sweep(args)
    print("No GPU here: nothing is timed. The kernels in Triton's interpreter against float64:", flush=True)
    checking, environment = child("check", "--kind", "portable resident")
    code = subprocess.run(checking, env=environment).returncode
    print(flush=True)
    residency.show(WORKLOADS)
    print(flush=True)
    plot([], out)
    return code


if __name__ == "__main__":
    sys.exit(main())
