"""The cases of ``python -m triton_lstm check``: every kernel, at small sizes, is compared with float64.

``cases`` lists the cases of a device. ``run`` computes one of them in this process and says how it ended. Between
processes a ``Case`` travels as JSON. ``runner`` starts and stops the processes.
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import torch

from . import op
from .functional import lstm
from .kernels.waiting import wait_report
from .layer import LSTM
from .plan import Plan, PlanError, candidates, check_plan, make_plan
from .plan.plan import split_slices
from .plan.search import precision_for
from .reference import lstm_reference, packed_reference, zoneout_shares

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
# Relative error in the norm that a result may have, by how products are computed: ten times what torch's own LSTM has
# over 256 steps, in fp16 (whose ten bits TF32 has too) four times. A wrong kernel is off by the order of one; the tests
# of the package hold results to a closer budget.
TOLERANCE = {"bf16": 4e-2, "fp16": 1e-2, "tf32": 1e-2, "fp32": 1e-5}
# Units at which each variant has several programs, chunks of R and units of padding.
VARIANTS = {"portable resident": 33, "resident": 33, "grid": 100, "split": 100, "wgmma": 100, "streamed": 100,
            "wide split": 300, "cluster 2": 33, "cluster 4": 100, "cluster 8": 200, "cluster 16": 300}
WIDE_ROOM = 1 << 15     # bytes of R in registers of a wide split plan: less than R of its layer takes
KINDS = (*VARIANTS, op.STEP)
KEEP_EVERY = 4          # fewer than the steps, for several chunks
REUSES = 50


@dataclasses.dataclass(frozen=True)
class Case:
    """What is checked.

    kind    the variant of the plan, or ``op.STEP``, whose kernel needs none
    what    "layer", "gates" (the same with ``keep_gates``), "many rows", "many rows, gates", "lengths", "packed",
            "zoneout", "one step", "layers", "wavefront", "graph", "stream", "reuse" or "two processes"
    plan    encoded; "" if there is none here, and then ``reason`` says why
    """
    kind: str
    dtype: str
    what: str
    steps: int = 0
    batch: int = 0
    inputs: int = 0
    hidden_size: int = 0
    directions: int = 1
    plan: str = ""
    reason: str = ""

    def encode(self):
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def decode(text):
        return Case(**json.loads(text))

    @property
    def runs(self):
        """Whether the device has such a kernel."""
        return bool(self.plan) or self.kind == op.STEP

    @property
    def label(self):
        return f"{self.kind}, {self.dtype}, {self.what}"

    @property
    def keeps_gates(self):
        return self.what in ("gates", "many rows, gates")

    def compiled(self):
        """(plan, dtype, options of ``compile_plan``) for the kernels that the case launches; None where it has no
        plan."""
        if not self.plan:
            return None
        return Plan.decode(self.plan), DTYPES[self.dtype], dict(
            flagged=self.what in ("lengths", "packed"), packed=self.what == "packed",
            zoneout="expected" if self.what == "zoneout" else None, inputs=self.inputs,
            keep_gates=self.keeps_gates)


def plan_of(variant, batch, hidden_size, dtype, directions, limits):
    """A plan of ``variant`` for a layer. Raises PlanError with the reason if there is none."""
    options: dict[str, Any] = dict(tf32=dtype == "tf32", keep_every=KEEP_EVERY)
    if limits is None:
        if variant != "portable resident":
            raise PlanError("the interpreter runs programs one by one")
        return make_plan(batch, hidden_size, DTYPES[dtype], directions, limits=None, **options)
    if variant in ("portable resident", "streamed"):
        plan = make_plan(batch, hidden_size, DTYPES[dtype], directions, limits=limits, zoneout=True,
                         schedule="resident" if variant == "portable resident" else "grid", **options)
        if variant == "streamed":       # so narrow a layer streams by no plan of its own
            plan = dataclasses.replace(plan, kind="streamed", r_slices=((0, 16),), block_k=16)
            check_plan(plan, limits)
        return plan
    for plan in candidates(batch, hidden_size, DTYPES[dtype], directions, limits=limits, **options):
        if plan.variant == "split" and variant == "wide split":     # registers would hold all of R of so narrow a layer
            slices = split_slices(hidden_size, plan.precision, plan.block_h, WIDE_ROOM)
            plan = dataclasses.replace(plan, r_slices=slices, register_room=WIDE_ROOM)
            check_plan(plan, limits)
        if plan.variant == variant:
            return plan
    raise PlanError(f"no {variant} plan for H={hidden_size} in {dtype} on this device with this Triton")


def cases(limits):
    """All cases of a device with ``limits`` (None: the interpreter). The smallest and safest come first."""
    found = []

    def add(variant, dtype, what, steps, batch, inputs, hidden_size, directions=1):
        sizes: dict[str, Any] = dict(steps=steps, batch=batch, inputs=inputs, hidden_size=hidden_size,
                                     directions=directions)
        try:
            plan = plan_of(variant, batch, hidden_size, dtype, directions, limits)
            found.append(Case(variant, dtype, what, plan=plan.encode(), **sizes))
        except PlanError as error:
            found.append(Case(variant, dtype, what, reason=str(error), **sizes))

    for dtype in DTYPES:
        found.append(Case(op.STEP, dtype, "layer", 1, 17, 20, 100, 2))
    has = lambda variant, dtype: dtype != "fp32" or variant in ("portable resident", "grid", "streamed")
    for variant, H in VARIANTS.items():
        add(variant, "fp16", "one step", 1, 1, 20, H)
    for variant, H in VARIANTS.items():
        for dtype in DTYPES:
            if has(variant, dtype):
                add(variant, dtype, "layer", 9, 17, 20, H, 2)
    for variant, H in VARIANTS.items():
        for dtype in ("fp16", "tf32", "fp32"):
            if has(variant, dtype):
                add(variant, dtype, "gates", 9, 17, 20, H, 2)
    for variant, H in VARIANTS.items():
        # with many rows these backward loops compute their coefficients
        if variant in ("resident", "grid") or variant.startswith("cluster"):
            for dtype in ("fp16", "tf32"):
                add(variant, dtype, "many rows", 9, 520, 20, H, 2)
            add(variant, "fp16", "many rows, gates", 9, 520, 20, H, 2)
    for what in ("lengths", "packed", "zoneout"):
        for variant, H in VARIANTS.items():
            if what != "zoneout" or variant in ("portable resident", "grid", "streamed"):
                add(variant, "bf16", what, 9, 17, 20, H)
    for dtype in DTYPES:
        add("portable resident", dtype, "layers", 7, 17, 5, 33, 2)
    if limits is not None:
        for variant, H in VARIANTS.items():
            add(variant, "fp16", "graph", 9, 17, 20, H)
            add(variant, "bf16", "reuse", 9, 33, 20, H)
        add("grid", "fp16", "stream", 9, 17, 20, 100)
        add("split", "fp16", "wavefront", 256, 3, 20, 100)
        add("grid", "fp16", "two processes", 9, 17, 20, 100)
    missing = {}        # one line for each variant and type that the device does not have
    for case in found:
        if not case.runs:
            missing.setdefault((case.kind, case.dtype), case)
    return [case for case in found if case.runs or missing[case.kind, case.dtype] is case]


def _problem(case, seed):
    """Inputs and gradients of ``case`` in float64 on the CPU, rounded to its type, and options of ``lstm``."""
    T, B, I, H, D = case.steps, case.batch, case.inputs, case.hidden_size, case.directions
    generator = torch.Generator().manual_seed(seed)
    rounded = lambda t: t.to(DTYPES[case.dtype]).double()
    normal = lambda *shape: rounded(torch.randn(shape, generator=generator))
    uniform = lambda *shape: rounded((torch.rand(shape, generator=generator) * 2 - 1) / H ** 0.5)
    inputs = dict(x=normal(T, B, I), w=uniform(D, 4 * H, I), r=uniform(D, 4 * H, H), b=uniform(D, 4 * H),
                  h0=normal(D, B, H), c0=normal(D, B, H))
    gradients = [normal(T, B, D * H), normal(D, B, H), normal(D, B, H)]
    options: dict[str, Any] = {}
    if case.what in ("lengths", "packed"):
        lengths = torch.randint(1, T + 1, (B,), generator=generator).sort(descending=True).values
        lengths[0] = T
        if case.what == "packed":
            live = torch.arange(T)[:, None] < lengths
            options = dict(batch_sizes=live.sum(1))
            inputs["x"], gradients[0] = inputs["x"][live], gradients[0][live]
        else:
            options = dict(lengths=lengths, reset=torch.rand(T, B, generator=generator) < 0.2)
    if case.what == "zoneout":
        options = dict(zoneout=(0.1, 0.2), training=False)
    return inputs, gradients, options


def _results(function, inputs, gradients):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = function(*leaves.values())
    found = torch.autograd.grad(outputs, list(leaves.values()), [g.to(y) for g, y in zip(gradients, outputs)])
    return dict(zip(("y", "h_n", "c_n"), (y.detach() for y in outputs)), **{f"d{n}": g for n, g in zip(leaves, found)})


def exact(case, seed=0):
    """The right results and gradients, in float64, by name."""
    inputs, gradients, options = _problem(case, seed)
    T, (D, B, H) = case.steps, inputs["h0"].shape
    if "batch_sizes" in options:
        function = lambda *given: packed_reference(*given, batch_sizes=options["batch_sizes"])
    elif case.what == "zoneout":
        keep = zoneout_shares((None, *options["zoneout"]), T, B, D, H, inputs["x"])
        function = lambda *given: lstm_reference(*given, keep=keep)
    else:
        function = lambda *given: lstm_reference(*given, lengths=options.get("lengths"), reset=options.get("reset"))
    return _results(function, inputs, gradients)


def ours(case, device, seed=0):
    """Results and gradients of the kernels, by name."""
    inputs, gradients, options = _problem(case, seed)
    put = lambda t: t.to(device) if t.is_floating_point() else t
    options = {name: value.to(device) if name in ("lengths", "reset") else value for name, value in options.items()}
    plan = Plan.decode(case.plan)

    def function(*given):
        y, (h_n, c_n) = lstm(*given[:4], hx=given[4:], plan=plan, keep_gates=case.keeps_gates, **options)
        return y, h_n, c_n
    inputs = {name: put(t).to(DTYPES[case.dtype]) for name, t in inputs.items()}
    return _results(function, inputs, [put(g) for g in gradients])


def relative_error(found, exactly):
    """|found - exactly| / |exactly| in the Euclidean norm: 0 if both are zero, NaN if ``found`` is not finite."""
    return ((found.to(exactly) - exactly).norm() / exactly.norm().clamp(min=1e-300)).item()


def compare(case, got, right):
    """The outcome for results ``got`` whose exact values are ``right``: "outcome", "error" and, if wrong, "where"."""
    allowed, worst, wrong = TOLERANCE[case.dtype], 0., {}
    for name, exactly in right.items():
        error = relative_error(got[name], exactly)
        worst = error if not error <= worst else worst          # NaN is the worst
        if not error <= allowed:
            bad = ~((got[name].to(exactly) - exactly).abs() <= allowed * exactly.abs().max())
            wrong[name] = dict(error=error, first=bad.nonzero()[0].tolist() if bad.any() else None,
                               share=bad.double().mean().item())
    if not wrong:
        return dict(outcome="right", error=worst, allowed=allowed)
    return dict(outcome="wrong", error=worst, allowed=allowed, where=wrong)


@contextlib.contextmanager
def switched(dtype):
    """torch's switch for fp32 in LSTMs is set as ``dtype``, one of DTYPES, needs it."""
    if dtype not in ("tf32", "fp32"):
        yield
        return
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _graph(case, device):
    """y, h_n, c_n of a CUDA graph of the forward pass that is replayed with other inputs than it was captured with."""
    inputs, _, _ = _problem(case, 0)
    others, _, _ = _problem(case, 1)
    plan = Plan.decode(case.plan)
    put = lambda given: {name: t.to(device, DTYPES[case.dtype]) for name, t in given.items()}
    inputs, others = put(inputs), put(others)
    call = lambda given: lstm(*list(given.values())[:4], hx=(given["h0"], given["c0"]), plan=plan)
    with torch.no_grad():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            call(inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, (h_n, c_n) = call(inputs)
        for name, t in inputs.items():
            t.copy_(others[name])
        graph.replay()
        graph.replay()
        torch.cuda.synchronize(device)
    return dict(y=y, h_n=h_n, c_n=c_n)


def _one_step(case, device):
    """y, h_n, c_n of the kernel for one step without gradients, even where it is avoided."""
    x, w, r, b, h0, c0 = (t.to(device, DTYPES[case.dtype]) for t in _problem(case, 0)[0].values())
    precision = precision_for(x.dtype, case.dtype == "tf32")
    # half of the bias as each of nn.LSTM's two
    weights = [(w[d], r[d], b[d] / 2, b[d] / 2) for d in range(case.directions)]
    y, h_n, c_n = op.sequence.one_step(x, weights, h0, c0, h0.shape, case.directions, precision)
    return dict(y=y, h_n=h_n, c_n=c_n)


def _layers(case, device):
    """Results of several layers, and of nn.LSTM in float64: three layers as a wavefront, or two in both directions."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(num_layers=3 if case.what == "wavefront" else 2, bidirectional=case.directions == 2,
                                   batch_first=case.what == "layers")
    layer = LSTM(case.inputs, case.hidden_size, dtype=DTYPES[case.dtype], **options)
    right = torch.nn.LSTM(case.inputs, case.hidden_size, dtype=torch.float64, **options)
    right.load_state_dict(layer.state_dict())
    sizes = (case.batch, case.steps) if layer.batch_first else (case.steps, case.batch)
    x = torch.randn(*sizes, case.inputs, dtype=DTYPES[case.dtype])

    def results(module, x):
        y, (h_n, c_n) = module(x.requires_grad_())
        (y.sin().sum() + h_n.sum() + c_n.sum()).backward()
        return dict(y=y.detach(), h_n=h_n.detach(), c_n=c_n.detach(), dx=x.grad,
                    **{f"d{name}": p.grad for name, p in module.named_parameters()})
    layer.to(device).plan = Plan.decode(case.plan)
    return results(layer, x.to(device)), results(right, x.detach().double())


def _microseconds(case, device):
    """Microseconds per step of a forward and of a backward call over 64 steps; the best of five."""
    T = 64
    inputs, _, _ = _problem(dataclasses.replace(case, steps=T), 0)
    given = [t.to(device, DTYPES[case.dtype]).requires_grad_() for t in inputs.values()]
    plan, best = Plan.decode(case.plan), [float("inf")] * 2
    for _ in range(5):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        y, _ = lstm(*given[:4], hx=given[4:], plan=plan)
        events[1].record()
        torch.autograd.grad(y.sum(), given)
        events[2].record()
        torch.cuda.synchronize(device)
        best = [min(b, 1000 * a.elapsed_time(c) / T) for b, a, c in zip(best, events, events[1:])]
    return dict(forward_us=best[0], backward_us=best[1])


def measure(case, device):
    """The outcome of ``case`` on ``device``, computed in this process."""
    with switched(case.dtype):
        if case.what in ("layers", "wavefront"):
            return compare(case, *_layers(case, device))
        if case.kind == op.STEP:
            right = exact(case)
            return compare(case, _one_step(case, device), {name: right[name] for name in ("y", "h_n", "c_n")})
        if case.what == "graph":
            right = exact(case, 1)
            return compare(case, _graph(case, device), {name: right[name] for name in ("y", "h_n", "c_n")})
        if case.what == "reuse":
            # every other one with data of its own, so that what an earlier call left behind is wrong
            right = [exact(case, seed) for seed in range(2)]
            for n in range(REUSES):
                found = compare(case, ours(case, device, n % 2), right[n % 2])
                if found["outcome"] != "right":
                    return {**found, "call": n}
            return found
        if case.what == "two processes":
            alone = dataclasses.replace(case, what="reuse")
            command, environment = child("worker")
            other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            try:
                assert other.stdin and other.stdout
                other.stdin.write(alone.encode() + "\n")
                other.stdin.flush()
                other.stdout.readline()             # it is ready, and begins
                found = measure(alone, device)
                theirs = json.loads(other.stdout.readline())
            finally:
                other.kill()
                other.wait()
            return found if found["outcome"] != "right" else theirs
        with torch.cuda.stream(torch.cuda.Stream(device)) if case.what == "stream" else contextlib.nullcontext():
            found = compare(case, ours(case, device), exact(case))
            if found["outcome"] == "right" and device.type == "cuda" and case.what == "layer":
                found.update(_microseconds(case, device))
            return found


def told(compute):
    """What ``compute()`` returns, or its exception as an outcome, with "fatal" if the process cannot use the GPU any
    more."""
    try:
        return compute()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        record = wait_report()
        if record is not None:
            return dict(outcome="trapped", message=text, record=record, fatal=True)
        fatal = "CUDA" in text and not isinstance(error, (PlanError, torch.OutOfMemoryError))
        compiling = any(name in type(error).__module__ + type(error).__name__ for name in
                        ("CompilationError", "PTXASError", "triton.compiler", "OutOfResources"))
        return dict(outcome="failed to compile" if compiling else "failed to launch", message=text, fatal=fatal)


def run(case, device):
    """The outcome of ``case`` on ``device``; an exception is an outcome too."""
    def compute():
        found = measure(case, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)      # its errors are the case's
        return found
    return told(compute)


def facts() -> dict[str, Any]:
    """The GPU and its limits, for JSON. "gpu" is None if the interpreter is on or there is no GPU, or if no kernel runs
    on the one there is, and then "none" says why."""
    from . import faults
    if op.interpreted() or not torch.cuda.is_available():
        return dict(gpu=None)
    device = torch.device("cuda", 0)
    if reason := op.no_kernels(device):
        return dict(gpu=None, none=f"{torch.cuda.get_device_name(device)}: torch's own LSTM computes, because {reason}")
    major, minor = torch.cuda.get_device_capability(device)
    limits = op.limits_of(device)
    assert limits is not None           # which only the interpreter has
    return dict(gpu=torch.cuda.get_device_name(device), capability=[major, minor], driver=faults.driver(),
                place=faults.place(device), limits=dataclasses.asdict(limits))


def child(*command):
    """(command line, environment) for ``python -m triton_lstm`` with the arguments ``command``.

    The environment makes it import the copy of the package that runs now.
    """
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, "-m", "triton_lstm", *command], {**os.environ, "PYTHONPATH": path}


def ask_facts() -> dict[str, Any]:
    """``facts``, asked of a child process, so that this process does not use the GPU.

    If the child does not answer, "gpu" is None and "error" says so.
    """
    command, environment = child("facts")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        return json.loads(result.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        return dict(gpu=None, error="the process that asks for the GPU did not answer")
