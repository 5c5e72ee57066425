"""Command line of the benchmark."""
import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import warnings

import torch

from triton_lstm.kernels import launch

from . import correctness, residency, sweep, train
from .workloads import WORKLOADS

DESCRIPTION = """\
Benchmark of triton_lstm.

With no command, on a GPU: times triton_lstm.LSTM against cuDNN (torch.nn.LSTM) over H, batch and
dtype into sweep.csv and sweep.png; each result is checked against float64 first. Without a GPU
nothing is timed: the kernels are checked in Triton's interpreter (as `check`), then comes the table
of `residency`. The exit code is 1 if a check fails."""

RESIDENCY = """\
Compiles the plan of every workload, reads the machine code of its time loops, and prints a Markdown
table: where R lives, registers, spills, barriers, a bound of the cycles of a step. Needs no GPU."""

CHECK = """\
Compares a few small layers of odd shapes with float64, forward and backward. The kernels run in
Triton's interpreter on the CPU."""

TRAIN = """\
Trains a character model on the sources of Python's standard library with torch's LSTM and with ours,
from the same weights on the same batches, and draws both loss curves and speeds into train.png.
Without a GPU the kernels run in Triton's interpreter, at tiny sizes and with no speeds."""


def positive(text):
    """An argument that must be a positive integer."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser():
    """The command line."""
    options = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    root = argparse.ArgumentParser("python -m bench", description=DESCRIPTION, **options)
    out = dict(type=pathlib.Path, metavar="FOLDER", help="where results go (default: results)")
    root.add_argument("--out", default=pathlib.Path("results"), **out)
    commands = root.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    p = commands.add_parser("residency", help="where R lives and what a step costs, from machine code",
                            description=RESIDENCY, **options)
    p.add_argument("--arch", type=int, default=90, choices=(80, 90, 100), help="compute capability (default: 90)")
    p.add_argument("--workload", nargs="+", metavar="NAME", default=[w.name for w in WORKLOADS],
                   choices=[w.name for w in WORKLOADS], help="only these, of " + ", ".join(w.name for w in WORKLOADS))

    commands.add_parser("check", help="the kernels in Triton's interpreter against float64", description=CHECK,
                        **options)

    p = commands.add_parser("train", help="a character model with torch's LSTM and ours side by side",
                            description=TRAIN, **options)
    p.add_argument("--out", **{**out, "default": argparse.SUPPRESS})        # may also come before the command
    sizes = {name: dataclasses.asdict(sizes) for name, sizes in train.SIZES.items()}
    for name, meaning in (("batch", "sequences in a batch"), ("sequence", "characters in a sequence"),
                          ("hidden", "units of the model"), ("steps", "training steps")):
        p.add_argument(f"--{name}", type=positive, metavar="N", help=f"{meaning} (default: {sizes['cuda'][name]} on a "
                                                                     f"GPU, {sizes['interpreter'][name]} without)")
    p.add_argument("--layers", type=positive, default=1, metavar="N", help="of the LSTM (default: 1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    # fp16 would need its losses scaled
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the whole model (default: fp32)")
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


def main(arguments=None):
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    interpreted, gpu = launch.INTERPRET, torch.cuda.is_available()
    if interpreted and args.command in (None, "residency"):
        sys.exit("unset TRITON_INTERPRET: this compiles kernels")
    # where ours steps aside for torch's LSTM there is nothing to compare
    warnings.filterwarnings("error", "triton_lstm.LSTM uses torch's own LSTM")
    if args.command == "residency":
        residency.show([w for w in WORKLOADS if w.name in args.workload], args.arch)
        return 0
    if args.command == "check":
        return int(not correctness.check_interpreted()) if interpreted else run_in_interpreter(arguments)
    if args.command == "train":
        if not interpreted and not gpu:
            return run_in_interpreter(arguments)
        sizes = train.SIZES["interpreter" if interpreted else "cuda"]
        chosen = {name: getattr(args, name) for name in dataclasses.asdict(sizes) if getattr(args, name)}
        return train.run(args.out, dataclasses.replace(sizes, **chosen), args.layers, args.seed, args.dtype,
                         interpreted)
    if gpu:
        return sweep.run(args.out)
    print("No GPU here: nothing is timed. The kernels in Triton's interpreter against float64:", flush=True)
    code = run_in_interpreter(["check"])
    print(flush=True)
    residency.show(WORKLOADS)
    return code


if __name__ == "__main__":
    sys.exit(main())
