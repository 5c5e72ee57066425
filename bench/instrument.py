"""Reads time, memory and clocks off a GPU, and what this machine and repository are."""
import datetime
import pathlib
import subprocess
import time

import torch
import triton

from .rows import Environment

ROOT = pathlib.Path(__file__).parents[1]


class Gpu:
    """One CUDA device as an instrument. Tests put another in its place."""
    device = "cuda"

    def __init__(self):
        # twice the second-level cache: nothing that a call reads is left there by the call before
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self._flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def synchronize(self):
        torch.cuda.synchronize()

    def sample(self, call, stream=False):
        """Milliseconds of one call: the GPU's between events; for a ``stream`` of single steps what the host waits.

        The cache is flushed first, during which the host goes ahead; what it takes longer than that to launch a call
        is part of the call's time.
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
        """The most that ``call`` allocates at once."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def clocks(self):
        """MHz of the multiprocessors and the memory right now; None each where nvidia-smi does not tell."""
        try:
            out = subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits",
                                  f"--id={torch.cuda.current_device()}"], capture_output=True, text=True, check=True)
            return tuple(map(int, out.stdout.split(",")))
        except (OSError, subprocess.CalledProcessError, ValueError):
            return None, None

    def release(self):
        """Give memory of earlier cases back."""
        torch.cuda.empty_cache()


def commit():
    """This repository's commit, with a "+" where files differ from it; "unknown" outside git."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-uno").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment():
    """What a timing on this machine depends on."""
    return Environment(torch.cuda.get_device_name(), torch.__version__, str(torch.backends.cudnn.version()),
                       triton.__version__, commit(), datetime.datetime.now().isoformat("T", "minutes"))
