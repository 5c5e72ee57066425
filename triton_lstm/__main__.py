"""``python -m triton_lstm``: what the package finds on this machine, and whether its kernels work on it."""
import argparse
import itertools
import json
import os
import platform
import sys
import time

import torch

from . import cachefile, check, contest, faults, op, runner, tuned, tuning
from .kernels import waiting
from .kernels.language import VERSION
from .kernels.offline import compile_apart
from .plan import Limits, Plan
from .plan.limits import needed
from .table import aligned

DESCRIPTION = """\
With no command: versions, the GPU, and what the package uses there. check: runs every kernel at small sizes against
float64, on this GPU or, where there is none, in Triton's interpreter."""
CHECK = """\
Each case runs in a process that is killed when it takes too long, so that a kernel that hangs costs seconds. One line
of JSON a case, as soon as it is known, then a table. What is wrong on a GPU is remembered, and automatic plans keep
away from it, until a later check finds it right. The exit code is 1 if anything is not right."""
TUNED = """\
What triton_lstm.tune has measured and remembers in the user's cache folder, on all GPUs."""
SHARE = {True: 15., False: 120.}        # seconds of a case at most, on a GPU and in the interpreter
WAIT_LIMIT = "2"                        # seconds that a kernel waits there before it gives up


def about(facts):
    """Print versions, the GPU, and what the package uses there."""
    compiler = f"Triton {VERSION}" if VERSION else "no Triton"
    print(f"triton_lstm {faults.version()}, torch {torch.__version__} (CUDA {torch.version.cuda}), {compiler}, "
          f"Python {platform.python_version()}, {platform.platform()}")
    if "error" in facts:
        print(f"GPU: unknown: {facts['error']}")
        return
    if "none" in facts:
        print(f"GPU: {facts['none']}.")
        return
    if VERSION is None:
        print("Triton is not installed, so torch.nn.LSTM computes everything.")
        return
    if facts["gpu"] is None:
        print("GPU: none. torch.nn.LSTM computes for CPU tensors; with TRITON_INTERPRET=1 the kernels do, slowly.")
        return
    limits = Limits(**facts["limits"])
    print(f"GPU: {facts['gpu']}, compute capability {'.'.join(map(str, facts['capability']))}, driver for CUDA "
          f"{facts['driver'] // 1000}.{facts['driver'] % 1000 // 10}, {limits.multiprocessors} multiprocessors, "
          f"{limits.shared_memory // 1024} KiB of shared memory each")
    print("Kernels: plain Triton" + (", Gluon (resident, split)" if limits.cluster else
                                     f"; no Gluon, which needs {needed('gluon')}")
          + (", warp groups (wgmma)" if limits.cluster and limits.wgmma else "")
          + (f", clusters of up to {limits.cluster}" if limits.cluster > 1 else
             f"; no clusters, which need {needed('cluster')}"))
    for key, what in sorted(faults.of(facts["place"]).items()):
        print(f"Avoided: {' '.join(key)}: {what}")
    print("`python -m triton_lstm check` runs every kernel against float64.")


def _line(case, found, seconds):
    """A case and its outcome, as one line of JSON."""
    sizes = dict(T=case.steps, B=case.batch, I=case.inputs, H=case.hidden_size, D=case.directions)
    backward = Plan.decode(case.plan).backward.variant if case.plan else case.kind
    return dict(kind=case.kind, backward_kind=backward, dtype=case.dtype, what=case.what, **sizes, **{
        "outcome": "failed", "forward_us": None, "backward_us": None, **found, "seconds": round(seconds, 2)})


def loops_of(line):
    """The loops that a line says are wrong. A wrong result tells by its name, a record by its kernel; otherwise
    both."""
    if line["outcome"] == "wrong":
        names = set(line["where"])
        return ("forward",) if names & {"y", "h_n", "c_n"} else ("backward",)
    for loop in faults.LOOPS:
        if f"{loop}_" in line.get("record", ""):
            return (loop,)
    return faults.LOOPS


def remember(where, lines):
    """Write into the cache folder what the lines of a check on a GPU say."""
    precision = lambda line: {"fp16": "native", "bf16": "native", "tf32": "tf32", "fp32": "tf32x3"}[line["dtype"]]
    found, right = {}, set()
    for line in lines:
        keys = [(line["kind"], "forward", precision(line)), (line["backward_kind"], "backward", precision(line))]
        if line["outcome"] == "right":
            right.update(keys)
        elif line["outcome"] in ("wrong", "trapped", "hung", "died", "failed to compile", "failed to launch"):
            what = f"{line['outcome']}: {line['what']}"
            found.update((key, what) for key in keys if key[1] in loops_of(line))
    faults.remember(where, found, right - set(found))
    return found


def table(lines):
    """A table of kinds and types: how many cases are right, or the outcome of the first that is not."""
    kinds, dtypes = list(dict.fromkeys(line["kind"] for line in lines)), list(check.DTYPES)
    rows = [["", *dtypes, "us a step, forward / backward call"]]
    for kind in kinds:
        row = [kind]
        for dtype in dtypes:
            of = [line for line in lines if (line["kind"], line["dtype"]) == (kind, dtype)]
            bad = [line["outcome"] for line in of if line["outcome"] != "right"]
            row.append("" if not of else bad[0] if bad else f"{len(of)} right")
        times = [line for line in lines if line["kind"] == kind and line["forward_us"]]
        row.append(", ".join(f"{line['dtype']} {line['forward_us']:.1f} / {line['backward_us']:.1f}" for line in times))
        rows.append(row)
    return aligned(rows)


def run_check(args):
    """The command ``check``; returns the exit code."""
    end = time.monotonic() + args.seconds
    facts = check.ask_facts()
    gpu = facts["gpu"] is not None
    limits = Limits(**facts["limits"]) if gpu else None
    cases = [case for case in check.cases(limits) if not args.kind or case.kind in args.kind]
    if not cases:
        sys.exit(f"no such kind; there are {', '.join(check.KINDS)}")
    if args.list:
        print("\n".join(case.label + (f": {case.reason}" if case.reason else "") for case in cases))
        return 0
    about(facts)
    more = {waiting.VARIABLE: os.environ.get(waiting.VARIABLE, WAIT_LIMIT)} if gpu else {"TRITON_INTERPRET": "1"}
    if gpu:
        jobs = {(plan.compiled_as, dtype, str(options)): (plan, dtype, options) for plan, dtype, options in
                filter(None, (case.compiled() for case in cases))}
        major, minor = facts["capability"]
        done = sum(1 for _ in compile_apart(list(jobs.values()), 10 * major + minor, 0.5 * args.seconds))
        print(f"compiled {done} of {len(jobs)} plans in {args.seconds - (end - time.monotonic()):.0f} s", flush=True)
    else:
        print("No GPU: the kernels that run by themselves are checked in Triton's interpreter.", flush=True)
    lines, file = [], open(args.out, "w") if args.out else sys.stdout
    try:
        possible = [(case, case.encode()) for case in cases if case.runs]
        none = [(case, {"outcome": "not here", "message": case.reason}, 0.) for case in cases if not case.runs]
        worker, environment = check.child("worker")
        results = runner.run(possible, worker, end - time.monotonic(), SHARE[gpu], {**environment, **more})
        for case, found, seconds in itertools.chain(none, results):
            lines.append(_line(case, found, seconds))
            print(json.dumps(lines[-1]), file=file, flush=True)
    finally:
        if args.out:
            file.close()
    print(table(lines))
    bad = [line for line in lines if line["outcome"] not in ("right", "not here", "not reached")]
    for line in bad:
        print(f"{line['outcome'].upper()}: {line['kind']}, {line['dtype']}, {line['what']}: "
              f"{line.get('record') or line.get('message') or line.get('where')}")
    if gpu:
        remember(facts["place"], lines)
    reached = sum(line["outcome"] == "right" for line in lines)
    print(f"{reached} right, {len(bad)} not, {sum(line['outcome'] == 'not reached' for line in lines)} not reached, "
          f"{sum(line['outcome'] == 'not here' for line in lines)} not here")
    return int(bool(bad) or not reached)


def print_tuned():
    """The command ``tuned``."""
    plans = tuned.everything()
    for where, calls in plans.items():
        print(f"{where}\n{tuning.describe(calls)}")
    if not plans:
        print(f"No plan was measured: there is none in {cachefile.folder() / tuned.FILE}. triton_lstm.tune measures.")


def run_case(kind):
    """The command ``case``; returns the exit code."""
    gpu = check.facts()["gpu"] is not None
    device = torch.device("cuda" if gpu else "cpu")
    case = next(case for case in check.cases(op.limits_of(device) if gpu else None)
                if case.kind == kind and (case.what == "layer" or not case.runs))
    if not case.runs or not gpu and not op.interpreted():
        print(f"{kind}: not here: {case.reason or 'no GPU'}")
        return 0
    found = check.run(case, device)
    print(json.dumps(_line(case, found, 0.)))
    return int(found["outcome"] != "right")


def _positive(text):
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return number


def parser():
    """The command line."""
    root = argparse.ArgumentParser("python -m triton_lstm", description=DESCRIPTION)
    commands = root.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    p = commands.add_parser("check", help="every kernel against float64", description=CHECK)
    p.add_argument("--seconds", type=_positive, default=90., metavar="N", help="for all of it (default: 90)")
    p.add_argument("--kind", action="append", metavar="NAME", choices=check.KINDS,
                   help=f"only this; may be repeated: {', '.join(check.KINDS)}")
    p.add_argument("--out", metavar="FILE", help="where the lines of JSON go (default: standard output)")
    p.add_argument("--list", action="store_true", help="list the cases and run none")
    for hidden in ("worker", "facts"):      # of ``check``'s own processes
        commands.add_parser(hidden)
    commands.add_parser("tuned", help="the plans that were measured, and their times", description=TUNED)
    for hidden in ("compile", "contest"):   # of ``tune``'s own processes
        commands.add_parser(hidden).add_argument("number", type=int)
    p = commands.add_parser("case", help="one small case of a kind, in this process: for sanitizers and profilers")
    p.add_argument("kind", choices=check.KINDS)
    return root


def main(arguments=None):
    """Run the command line, by default that of this process. Returns the exit code."""
    args = parser().parse_args(arguments)
    if args.command == "check":
        return run_check(args)
    if args.command == "facts":
        print(json.dumps(check.facts()))
    elif args.command == "case":
        return run_case(args.kind)
    elif args.command == "tuned":
        print_tuned()
    elif args.command == "compile":
        runner.serve(lambda line: tuning.compile_jobs(line, args.number))
    elif args.command == "contest":
        torch.cuda.set_device(args.number)
        runner.serve(lambda line: contest.answer(line, torch.device("cuda", args.number)))
    elif args.command == "worker":
        device = torch.device("cpu" if op.interpreted() else "cuda")
        runner.serve(lambda line: check.run(check.Case.decode(line), device))
    else:
        about(check.ask_facts())
    return 0


if __name__ == "__main__":
    sys.exit(main())
