"""The command line of the benchmark. `plot`, `compare` and `verify` import no torch."""
import argparse
import os
import pathlib
import subprocess
import sys

from .workloads import DTYPES, MODES, WORKLOADS

DESCRIPTION = """\
Benchmark of triton_lstm.

With no command, on a GPU: times triton_lstm.LSTM side by side with cuDNN (torch.nn.LSTM) and with other LSTM packages
that are installed. The cases are the layers of published models and a grid of sizes. Each result is first compared with
float64, and a provider whose result is wrong is not timed. Writes a CSV file, pictures and a report.

With no command, without a GPU: times nothing. Checks the kernels in Triton's interpreter, as `python -m triton_lstm
check` does, prints the table of `residency`, and draws the pictures of recorded runs.

The exit code is 1 if triton_lstm gives a wrong result or fails, and 130 if the run is interrupted."""

PROVIDERS = """\
providers (--quick times only those with a *; --record times all except those with a -; --full times all):
  triton_lstm          * triton_lstm.LSTM with its automatic plan
  triton_lstm SCHEDULE - the same with a plan of this schedule: resident, cluster, grid or streamed
  triton_lstm packed     the same on packed sequences; for ragged batches
  triton_lstm graph      the same, replayed from a CUDA graph
  triton_lstm recompute - the same, without gates kept for backward
  cuDNN                * torch.nn.LSTM with flattened weights; in TF32 if torch allows it
  cuDNN graph            the same, replayed from a CUDA graph
  cuDNN packed         * torch.nn.LSTM on packed sequences; for ragged batches
  cuDNN reset loop     * torch.nn.LSTM, called once for each step; for resets
  compiled loop        - a Python loop over one step, which torch.compile has compiled
  TorchRL, FlashRNN      the Triton kernels of these packages, if they are installed"""

TEXTS = dict(
    residency="""\
Compiles the plan of every workload and reads the machine code of its time loops. Prints a Markdown table: where the
recurrent weights R are, registers, spills, barriers, and a lower bound of the cycles of a step. Needs no GPU.""",
    train="""\
Trains a character model on the sources of Python's standard library, once with torch.nn.LSTM and once with
triton_lstm.LSTM, from the same weights and on the same batches. Draws both loss curves and both speeds into train.png.
Without a GPU the kernels run in Triton's interpreter: sizes are tiny, and speeds are left out. In 16-bit types the
optimizer keeps fp32 copies of the weights; in fp16 the loss is scaled.""",
    plot="""\
Draws the pictures of a run, and writes its report, from its CSV files. For a folder, the newest CSV file in it is read.
With no files named, the newest run of each GPU in bench/results is drawn. Needs no GPU and no torch.""",
    compare="""\
Prints by which factor the second run is faster than the first, for each case and provider, with the spread of this
ratio. Needs no GPU and no torch.""",
    verify="""\
Two calls that verify the package on a GPU, in at most five minutes each.

first    compares every kernel with float64 (`python -m triton_lstm check`, 90 s), times the loops of every candidate
         plan (`loops`, 140 s), and runs compute-sanitizer and ncu if they are installed
record   runs the most important GPU tests (60 s), the timings of `--record` (225 s with compiling), and the other GPU
         tests in the time that is left; draws the pictures

Each part has a time limit, and the others run even if one fails. At most 8 files are left in the folder of --out; read
report.md first.""",
    loops="""\
Times the forward and the backward time loop of every candidate plan of the workloads, each by itself, and writes them
into a CSV file. A candidate that hangs is killed.""",
    host="""\
Measures how long the host works for a call of each workload: Python, torch's dispatch and allocation, and Triton's
launcher. Needs a C and a C++ compiler and no GPU, for which a stub stands. Prints microseconds as a Markdown
table.""",
    traffic="""\
Counts what a call of each workload launches, and the bytes that it moves through device memory, with the gates
recomputed and with the gates kept for backward. Needs no GPU. Prints a Markdown table.""",
    fit="""\
Fits the constants of the cost model, which chooses plans, to the CSV file of `loops`, or with --arch to bounds from
machine code. Prints the old and new constants, how far the predictions of both are off, and which plans would change.
Needs no GPU and writes nothing.""")

ARCHS = (80, 86, 89, 90, 100, 120)
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
    root.add_argument("--out", help="where results go (default: bench/results/<gpu> for timings, else results)", **out)
    amount = root.add_mutually_exclusive_group()
    amount.add_argument("--quick", dest="amount", action="store_const", const="quick",
                        help="time a few cases, in under two minutes")
    amount.add_argument("--record", dest="amount", action="store_const", const="record",
                        help="time what README shows, as much of it as 200 s allow after compiling (default)")
    amount.add_argument("--full", dest="amount", action="store_const", const="full",
                        help="time every size of the grid; takes hours")
    root.add_argument("--resume", type=pathlib.Path, metavar="CSV",
                      help="go on with this file of an earlier run: time only what it has no row for")
    names = [*(w.name for w in WORKLOADS), "grid"]
    for name, choices in (("workload", names), ("dtype", list(DTYPES)), ("mode", list(MODES))):
        root.add_argument(f"--{name}", action="append", metavar="NAME", choices=choices,
                          help=f"time only this {name}; may be repeated: {', '.join(choices)}")
    root.add_argument("--provider", action="append", metavar="NAME",
                      help="time only this provider; may be repeated; see below")
    commands = root.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    def command(name, summary, epilog=None):
        p = commands.add_parser(name, help=summary, description=TEXTS[name], **options)
        if name not in ("residency", "compare", "loops", "fit", "host", "traffic"):
            p.add_argument("--out", default=argparse.SUPPRESS, help="where results go (default: results)", **out)
        return p

    p = command("residency", "where the recurrent weights R are and what a step costs, from machine code")
    p.add_argument("--arch", type=int, default=90, choices=ARCHS,
                   help="compute capability, times ten (default: 90)")
    p.add_argument("--workload", nargs="+", metavar="NAME", default=names[:-1], choices=names[:-1], dest="only",
                   help="only these workloads; there are " + ", ".join(names[:-1]))
    p = command("train", "train a character model with torch's LSTM and with ours, side by side")
    for name, meaning, default, tiny in (("batch", "sequences in a batch", 64, 8),
                                         ("sequence", "characters in a sequence", 128, 16),
                                         ("hidden", "hidden units of each layer", 512, 32),
                                         ("steps", "training steps", 300, 40)):
        p.add_argument(f"--{name}", type=positive, metavar="N",
                       help=f"{meaning} (default: {default} on a GPU, {tiny} without one)")
    p.add_argument("--layers", type=positive, default=1, metavar="N", help="layers of the LSTM (default: 1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and batches (default: 0)")
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="type of the whole model (default: fp32)",
                   dest="model_dtype")
    p = command("plot", "draw the pictures and write the report of a run from its CSV files")
    p.add_argument("files", nargs="*", type=pathlib.Path, metavar="CSV", help="files or folders")
    p = command("compare", "compare the times of two runs")
    p.add_argument("files", nargs=2, type=pathlib.Path, metavar="CSV", help="the first run, then the second")
    p = command("loops", "time the loops of every candidate plan, for `fit`")
    p.add_argument("--seconds", type=positive, default=140, metavar="N",
                   help="time limit, with compiling (default: 140)")
    p.add_argument("--csv", type=pathlib.Path, default=pathlib.Path("results/loops.csv"), metavar="FILE",
                   help="the file to write (default: results/loops.csv)")
    p.add_argument("--list", action="store_true", help="list the candidates of an H200 and time none")
    p = command("host", "how long the host works for a call of each workload, without a GPU")
    p.add_argument("--calls", type=positive, default=100, metavar="N", help="calls of each workload (default: 100)")
    p.add_argument("--workload", nargs="+", metavar="NAME", default=names[:-1], choices=names[:-1], dest="only",
                   help="only these workloads, as for `residency`")
    p = command("traffic", "count launches and bytes of a call of each workload, without a GPU")
    p.add_argument("--workload", nargs="+", metavar="NAME", default=names[:-1], choices=names[:-1], dest="only",
                   help="only these workloads, as for `residency`")
    p = command("fit", "fit the constants of the cost model to a CSV file of `loops`")
    of = p.add_mutually_exclusive_group(required=True)
    of.add_argument("file", nargs="?", type=pathlib.Path, metavar="CSV", help="a file that `loops` has written")
    of.add_argument("--arch", type=int, nargs="+", choices=ARCHS,
                    help="fit to the machine code of all workloads for these compute capabilities, times ten")
    p = command("verify", "verify the package on a GPU, in two calls of five minutes")
    p.add_argument("call", choices=("first", "record"), help="which of the two calls; see above")
    p.add_argument("--triton", type=pathlib.Path, metavar="FOLDER",
                   help="a folder with another version of Triton: `first` also checks and times with it, `record` uses "
                        "it in place of the installed one")
    return root


def run_in_interpreter(arguments):
    """Run this program with Triton's interpreter in a child process; returns the exit code.

    A child is needed because triton.jit chooses between compiler and interpreter when a kernel is imported.
    """
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen([sys.executable, "-m", "bench", *arguments],
                             env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:       # the child gets it too, and stores its results before it ends
            pass


def newest(folder):
    """The newest CSV file of a folder, or None."""
    return max(folder.glob("*.csv"), key=lambda path: (path.stat().st_mtime, path.name), default=None)


def plot(files, out):
    """Draw pictures and write a report of ``files`` into the folder ``out``. A folder among them stands for its newest
    CSV file. If ``files`` is empty, draw the newest run in each folder of RESULTS into a folder of its own in ``out``.
    """
    from . import plots, report, rows
    if not files:
        recorded = [(newest(folder), out / folder.name) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()
                    and newest(folder)]
        if not recorded:
            print("No run on a GPU is recorded in bench/results, so no pictures are drawn.")
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
    print(f"launch {floor.launch_us():.2f} us, exchange between 2, 8, 32, 64 programs "
          + ", ".join(f"{floor.exchange_us(plan, 'bf16'):.2f}" for plan in plans) + " us, GEMM "
          + ", ".join(f"{name} {floor.gemm_tflops(name):.0f}" for name in DTYPES) + " TFLOP/s", flush=True)
    code = sweeping.run(path, cases, chosen, gpu, floor, here, sweeping.EFFORTS[amount],
                        seconds and (seconds if amount == "record" else seconds - compiling_s))
    plot([path], out)
    return code


def time_loops(loops, args):
    """Run the command ``loops``; returns the exit code."""
    from triton_lstm.plan import H200
    if args.list:
        print("\n".join(candidate.label for candidate in loops.all_candidates(H200)))
        return 0
    from triton_lstm.check import ask_facts
    if (facts := ask_facts())["gpu"] is None:
        print("No GPU here: nothing is timed. Use --list to list the candidates.")
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
        if args.arch:
            residency.show_fit(args.arch)
            return 0
        from . import fit
        return fit.show_measured(args.file)
    if args.command == "host":
        from . import host
        host.show([w for w in WORKLOADS if w.name in args.only], args.calls)
        sys.stdout.flush()
        os._exit(0)     # at an orderly end Triton complains that functions of the stubs are still there
    if args.command == "traffic":
        from . import traffic
        return traffic.show([w for w in WORKLOADS if w.name in args.only and w.mode == "train"])
    if args.command == "loops":
        from . import loops
        return time_loops(loops, args)
    interpreted, gpu = INTERPRET, torch.cuda.is_available()
    if interpreted and args.command in (None, "residency"):
        sys.exit("unset TRITON_INTERPRET: this command compiles kernels")
    # A layer that falls back to torch's LSTM would be compared with itself.
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
    print("No GPU here: nothing is timed. The kernels are compared with float64 in Triton's interpreter:", flush=True)
    checking, environment = child("check", "--kind", "portable resident")
    code = subprocess.run(checking, env=environment).returncode
    print(flush=True)
    residency.show(WORKLOADS)
    print(flush=True)
    plot([], out)
    return code


if __name__ == "__main__":
    sys.exit(main())
