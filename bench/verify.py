"""The check for whoever gets a GPU for ten minutes: everything into one folder, whatever fails. Needs no torch."""
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
BENCH = [sys.executable, "-m", "bench"]
ABOUT = """\
import torch, triton
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Triton", triton.__version__)
print("GPU:", torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "none")"""


def parts(out):
    """Yield (name, command, seconds it may take); what comes late looks at what the earlier ones left."""
    yield "environment", [sys.executable, "-c", ABOUT], 60
    yield ("GPU tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-n", "8"], 240)
    yield "quick sweep", [*BENCH, "--quick", "--out", str(out)], 180
    if any(out.glob("*.csv")):          # the sweep draws them too, but not if it was stopped
        yield "pictures", [*BENCH, "plot", "--out", str(out), str(out)], 60
    yield "training", [*BENCH, "train", "--out", str(out)], 120


def run_part(command, seconds, log):
    """(what came of it, whether it went well); its output goes to the file ``log``, and its children end with it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with open(log, "w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                                 start_new_session=True)
        try:
            code = child.wait(seconds)
        except BaseException as reason:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if isinstance(reason, subprocess.TimeoutExpired):
                return f"stopped after {seconds} s", False
            raise
    return ("ok", True) if code == 0 else (f"exit code {code}", False)


def tail(log, lines=15):
    """The last lines that a part said."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def verify(out, steps=None):
    """Run each part, write ``report.md`` after each into the folder ``out``; returns the exit code: 1 if any failed."""
    out.mkdir(parents=True, exist_ok=True)
    text, good = ["# Verification"], True
    for name, command, seconds in steps or parts(out.resolve()):
        print(f"{name}, at most {seconds} s ...", flush=True)
        log, began = out / f"{name.replace(' ', '_')}.log", time.monotonic()
        outcome, passed = run_part(command, seconds, log)
        good = good and passed
        print(f"{name}: {outcome}", flush=True)
        text.append(f"## {name}: {outcome}, {time.monotonic() - began:.0f} s\n\n```\n{tail(log)}\n```")
        (out / "report.md").write_text("\n\n".join(text) + "\n")
    pictures = sorted(path.name for path in out.glob("*.png"))
    text += [f"![{name}]({name})" for name in pictures]
    (out / "report.md").write_text("\n\n".join(text) + "\n")
    print(f"wrote {out / 'report.md'}")
    return int(not good)
