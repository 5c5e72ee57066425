"""Measures time, memory and clocks of a GPU, and names this machine and the repository's commit."""
import datetime
import pathlib
import subprocess
import time

import torch
import triton

from triton_lstm.plan import Limits

from .rows import Environment

ROOT = pathlib.Path(__file__).parents[1]


class Gpu:
    """Measures on one CUDA device. Tests put a stand-in in its place."""
    device = "cuda"

    def __init__(self):
        # Twice the second-level cache: filling it removes from the cache what an earlier call left there.
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        limits = Limits.of(torch.device("cuda", 0))
        self.multiprocessors, self.multiply_adds = limits.multiprocessors, limits.multiply_adds
        self._flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def synchronize(self):
        torch.cuda.synchronize()

    def sample(self, call, stream=False):
        """Milliseconds of one call: between two events on the GPU or, for a ``stream`` of single steps, until the host
        has the result.

        The cache is flushed first. The host launches the call meanwhile; only launching that takes longer than the
        flush adds to the time between the events.
        """
        self._flush.zero_()
        if stream:
            torch.cuda.synchronize()
            before = time.perf_counter()
            call()
            torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - before)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, call):
        """The most bytes that ``call`` has allocated at one time."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clocks(self):
        """(MHz of the multiprocessors, MHz of the memory) at this moment; (None, None) if nvidia-smi does not tell."""
        try:
            out = subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits",
                                  f"--id={torch.cuda.current_device()}"], capture_output=True, text=True, check=True)
            return tuple(map(int, out.stdout.split(",")))
        except (OSError, subprocess.CalledProcessError, ValueError):
            return None, None

    def release(self):
        """Give the memory of earlier cases back to the device."""
        torch.cuda.empty_cache()


def commit():
    """This repository's commit, followed by "+" if files differ from it; "unknown" outside git."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-uno").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment():
    """The GPU and the versions that a timing depends on, and the date."""
    return Environment(torch.cuda.get_device_name(), torch.__version__, str(torch.backends.cudnn.version()),
                       triton.__version__, commit(), datetime.datetime.now().isoformat("T", "minutes"))
