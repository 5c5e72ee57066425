"""Host time of a layer's calls, without a GPU: Python, torch's dispatch and allocation, and Triton's launcher.

CPU tensors stand for CUDA tensors of an H100. Triton compiles the kernels and launches them by its own launcher, over a
libcuda that launches nothing (``host_stubs/libcuda.c``). The operators of torch that a layer calls allocate their
results and compute nothing (``host_stubs/operators.cpp``). So results are garbage, and only the time counts. The host
works while a GPU does: in a long run a call takes the longer of the two times, and not their sum.

``pretend`` changes the whole process, which should do nothing else.
"""
import ctypes
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sysconfig
import time

import torch

import triton_lstm
from triton_lstm import functional, layer, op, replay
from triton_lstm.dropout import Dropout
from triton_lstm.kernels import sequence, waiting
from triton_lstm.plan import H100

from .correctness import dtype_of

STUBS = pathlib.Path(__file__).parent / "host_stubs"
WARM_UP = replay.FIRST + 5      # calls that are not counted
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # of glibc's malloc.h


def build(folder):
    """Compile the stubs into ``folder`` unless they are there; returns the path of the operators. CalledProcessError or
    FileNotFoundError without a C and a C++ compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    include = pathlib.Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    root = pathlib.Path(torch.__file__).parent
    source = hashlib.sha256((STUBS / "operators.cpp").read_bytes()).hexdigest()[:8]
    driver, operators = folder / "libcuda.so.1", folder / f"operators-{torch.__version__}-{source}.so"
    if not driver.exists():
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-I", include,
                        STUBS / "libcuda.c", "-o", driver], check=True)
        (folder / "libcuda.so").unlink(missing_ok=True)
        (folder / "libcuda.so").symlink_to("libcuda.so.1")
    if not operators.exists():
        subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-std=c++20",
                        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                        "-I", sysconfig.get_paths()["include"], "-I", root / "include",
                        "-I", root / "include/torch/csrc/api/include", STUBS / "operators.cpp", "-o", operators,
                        "-L", root / "lib", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return operators


def stand_ins():
    """(owner, name, value) of what to replace so that layers treat any tensors as those of an H100."""
    def add_product(total, a, b, begun):        # as on CUDA: one product, or one and a sum
        if begun:
            return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(torch.mm(a, b))
        found = torch.mm(a, b) if total is None or a.dtype != total.dtype else torch.mm(a, b, out=total)
        # in 16-bit types an allocation more than on CUDA, whose product has a result in fp32
        return found if a.dtype == torch.float32 else torch.empty_like(found, dtype=torch.float32)
    def dropout(x, p, training=True):           # as on CUDA: one operator
        return torch.native_dropout(x, p, True)[0] if training else x
    def dropped(self, x):
        return torch.native_dropout(x, self.rate, True) if self.rate else (None, None)
    runs_kernels = lambda x, dtype: dtype in functional.DTYPES
    return [(functional, "runs_kernels", runs_kernels), (layer, "runs_kernels", runs_kernels),
            (op, "limits_of", lambda device: H100), (sequence, "_add_product", add_product),
            (torch.nn.functional, "dropout", dropout), (Dropout, "__call__", dropped),
            (Dropout, "of", classmethod(lambda cls, x, rate: cls(rate, 1 / (1 - rate))))]


def pretend(folder):
    """Put the stubs and the limits of an H100 in place, for the rest of the process."""
    operators = build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    torch.set_num_threads(1)
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)
            self.set_current_device = lambda device: None

    ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)      # found by its name from here on
    # Memory that was freed is taken again without a system call, as torch's allocator for CUDA does.
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        if not libc.mallopt(option, value):
            raise OSError(f"mallopt refused option {option}")
    driver.set_active(Driver())
    for owner, name, value in stand_ins():
        setattr(owner, name, value)
    waiting.records(torch.device("cpu"))        # with zeros that are read at the exit; this also makes torch register
                                                # its own operators first
    spec = importlib.util.spec_from_file_location("noop", operators)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def measure(workload, calls):
    """{"forward": microseconds of each of ``calls`` calls, "backward": ...}; no "backward" of inference."""
    w, dtype = workload, dtype_of(workload.dtype)
    lstm = triton_lstm.LSTM(w.input_size, w.hidden_size, w.layers, bidirectional=w.directions == 2, dropout=w.dropout,
                            dtype=dtype)
    T = 1 if w.mode == "stream" else w.steps
    x = torch.empty(T, w.batch, w.input_size, dtype=dtype)
    resets = dict(reset=torch.empty(T, w.batch, dtype=torch.bool)) if w.sequences == "resets" else {}
    state = torch.empty(2, w.layers * w.directions, w.batch, w.hidden_size, dtype=dtype)
    hx = tuple(state) if w.mode == "stream" else None
    training = w.mode == "train"
    found = {"forward": [], "backward": []} if training else {"forward": []}
    x.requires_grad_(training)
    with torch.set_grad_enabled(training):
        dy = torch.empty(T, w.batch, w.directions * w.hidden_size, dtype=dtype)
        for n in range(-WARM_UP, calls):
            lstm.zero_grad()
            x.grad = None
            times = [time.perf_counter()]
            y, _ = lstm(x, hx, **resets)
            times.append(time.perf_counter())
            if training:
                y.backward(dy)
                times.append(time.perf_counter())
            if n >= 0:
                for kind, before, after in zip(found, times, times[1:]):
                    found[kind].append(1e6 * (after - before))
    return found


class _Nothing(torch.autograd.Function):
    """Takes x and weights, and returns what it is given as outputs and as gradients."""

    @staticmethod
    def forward(ctx, outputs, gradients, *tensors):
        ctx.gradients = gradients
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx, *given):
        return None, None, *ctx.gradients.pop()


def autograd_alone(workload, calls):
    """``measure`` of an autograd.Function of the same tensors that computes nothing, with gradients that are there
    already: what autograd itself takes of a training step. Least microseconds (forward, backward)."""
    w, dtype = workload, dtype_of(workload.dtype)
    directions = w.directions
    layer = torch.nn.LSTM(w.input_size, w.hidden_size, w.layers, bidirectional=directions == 2, dtype=dtype)
    x = torch.empty(w.steps, w.batch, w.input_size, dtype=dtype, requires_grad=True)
    y = torch.empty(w.steps, w.batch, directions * w.hidden_size, dtype=dtype)
    state = torch.empty(w.layers * directions, w.batch, w.hidden_size, dtype=dtype)
    leaves, dy, found = [x, *layer.parameters()], torch.empty_like(y), []
    for _ in range(WARM_UP + calls):
        for leaf in leaves:
            leaf.grad = None
        gradients = [tuple(torch.empty_like(leaf) for leaf in leaves)]
        before = time.perf_counter()
        out, *_ = _Nothing.apply((y, state, state), gradients, *leaves)
        between = time.perf_counter()
        out.backward(dy)
        found.append((1e6 * (between - before), 1e6 * (time.perf_counter() - between)))
    return tuple(map(min, zip(*found[WARM_UP:])))


def show(workloads, calls):
    """Print the least and the median of ``calls`` calls of each workload, and the least that autograd alone takes, in
    microseconds, as Markdown. The least is what to compare between versions, since other processes only add to it."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    pretend(cache / "triton_lstm" / "host_stubs")
    print("| workload | forward, least | median | backward, least | median | autograd, forward | backward |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for w in workloads:
        found, cells = measure(w, calls), []
        for kind in ("forward", "backward"):
            times = sorted(found.get(kind, []))
            cells += [f"{times[0]:.0f}", f"{times[len(times) // 2]:.0f}"] if times else ["", ""]
        cells += [f"{least:.0f}" for least in autograd_alone(w, calls)] if w.mode == "train" else ["", ""]
        print(f"| {w.name} | {' | '.join(cells)} |", flush=True)
