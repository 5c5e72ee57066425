"""Verifies the package on a GPU in two calls of at most five minutes each. Needs no torch.

``first`` finds out which kernels are right and how fast each candidate plan is. ``record`` runs the GPU tests and the
benchmark. Each runs its parts one after the other, whether they fail or not, and writes all results into one folder.
"""
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = [sys.executable]
BENCH = [*PYTHON, "-m", "bench"]
SECONDS = 290           # time limit of a call, for all its parts together
MOST_FILES, MOST_BYTES = 8, 16 << 20
ABOUT = """\
import torch, triton
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Triton", triton.__version__)
print("GPU:", torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "none")"""


def first(out, triton=None):
    """Yield (name, command, time limit in seconds, environment) of each part of the first call. ``triton`` is a folder
    with another version of Triton, or None: with one, kernels are also checked and timed with that version."""
    yield "environment", [*PYTHON, "-c", ABOUT], 40, {}
    checked = lambda name, seconds: [*PYTHON, "-m", "triton_lstm", "check", "--seconds", str(seconds), "--out",
                                     str(out / name)]
    yield "check", checked("check.jsonl", 90), 110, {}
    yield "loops", [*BENCH, "loops", "--seconds", "100" if triton else "140", "--csv", str(out / "loops.csv")], 160, {}
    if triton:
        path = os.pathsep.join([str(triton), str(ROOT)])
        yield "check with the second Triton", checked("check_2.jsonl", 40), 60, dict(PYTHONPATH=path)
        yield ("loops with the second Triton", [*BENCH, "loops", "--seconds", "40", "--csv", str(out / "loops_2.csv")],
               60, dict(PYTHONPATH=path))
    for kind in ("resident", "split", "wgmma"):
        check = [*PYTHON, "-m", "triton_lstm", "case", kind]
        if sanitizer := shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck"):
                yield f"{tool} of {kind}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *check], 20, {}
        if ncu := shutil.which("ncu"):
            yield f"profile of {kind}", [ncu, "--set", "basic", *check], 20, {}


def record(out, triton=None):
    """The parts of the second call, as in ``first``. A folder ``triton`` takes the place of the installed Triton."""
    environment = dict(PYTHONPATH=os.pathsep.join([str(triton), str(ROOT)])) if triton else {}
    cores = str(max((os.cpu_count() or 2) // 2, 1))
    pytest = [*PYTHON, "-m", "pytest", "-v", "-rs", "-n", cores, "--timeout", "30"]
    yield "GPU tests", [*pytest, "-m", "gpu_first"], 60, environment
    yield "sweep", [*BENCH, "--record", "--out", str(out)], 225, environment
    if any(out.glob("2*.csv")):         # the sweep draws them itself, unless it was stopped
        yield "pictures", [*BENCH, "plot", "--out", str(out), str(out)], 30, environment
    yield "other GPU tests", [*pytest, "-m", "gpu and not gpu_first"], 120, environment


CALLS = dict(first=first, record=record)


def run_part(command, seconds, log, environment=()):
    """Run ``command`` for at most ``seconds``; returns (what came of it, whether it succeeded).

    Its output goes into the file ``log``. Processes that it has started are stopped with it.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), **dict(environment)}
    with open(log, "w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                                 start_new_session=True)
        try:
            code = child.wait(seconds)
        except BaseException as reason:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if isinstance(reason, subprocess.TimeoutExpired):
                return f"stopped after {seconds:.0f} s", False
            raise
    return ("ok", True) if code == 0 else (f"exit code {code}", False)


def tail(log, lines=15):
    """The last lines of the file ``log``."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def pack(out):
    """Leave at most MOST_FILES files of at most MOST_BYTES in ``out``. The least important ones go into rest.tar.gz."""
    order = [".md", ".jsonl", ".csv", ".png", ".log"]
    files = sorted((path for path in out.iterdir() if path.is_file() and path.name != "rest.tar.gz"),
                   key=lambda path: (order.index(path.suffix) if path.suffix in order else len(order), path.name))
    large = [path for path in files if path.stat().st_size > MOST_BYTES]
    kept = [path for path in files if path not in large]
    packed = out / "rest.tar.gz"
    rest = large + (kept[MOST_FILES - 1:] if large or packed.exists() or len(kept) > MOST_FILES else [])
    if not rest:
        return
    with tarfile.open(out / "rest.tmp", "w:gz") as new:
        if packed.exists():
            with tarfile.open(packed) as old:
                for member in old:
                    if not any(path.name == member.name for path in rest):
                        new.addfile(member, old.extractfile(member))
        for path in rest:
            new.add(path, path.name)
    os.replace(out / "rest.tmp", packed)
    for path in rest:
        path.unlink()


def verify(out, steps, seconds=SECONDS, clock=time.monotonic):
    """Run each part and, after each, write ``report.md`` in the folder ``out``; returns the exit code, 1 if one failed.

    steps     (name, command, time limit in seconds, environment) of each part
    seconds   time limit for all parts; those that are left after it are not begun
    """
    out.mkdir(parents=True, exist_ok=True)
    end, text, good = clock() + seconds, ["# Verification"], True
    for name, command, most, environment in steps:
        left = min(most, end - clock())
        if left < 1:
            text.append(f"## {name}: not begun, {seconds} s are over")
        else:
            print(f"{name}, at most {left:.0f} s ...", flush=True)
            log, began = out / f"{name.replace(' ', '_')}.log", clock()
            outcome, passed = run_part(command, left, log, environment)
            good = good and passed
            print(f"{name}: {outcome}", flush=True)
            text.append(f"## {name}: {outcome}, {clock() - began:.0f} s\n\n```\n{tail(log)}\n```")
        (out / "report.md").write_text("\n\n".join(text) + "\n")
        pack(out)
    pictures = sorted(path.name for path in out.glob("*.png"))
    (out / "report.md").write_text("\n\n".join([*text, *(f"![{name}]({name})" for name in pictures)]) + "\n")
    print(f"wrote {out / 'report.md'}")
    return int(not good)
