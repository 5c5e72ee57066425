"""Compares candidate plans of a call with the present plan, and times them. Runs in a process of its own, see
``tuning``: a kernel that hangs or traps ends only that process."""
import dataclasses
import functools
import json
import statistics

import torch
from torch.nn.utils.rnn import PackedSequence

from . import check, op
from .kernels import launch
from .kernels.rows import step_flags
from .layer import LSTM
from .plan import Plan
from .tuned import BACKWARD, FLAGS, FORWARD, PACKED, WHOLE, Call

STEPS, INPUTS, SAMPLES = 64, 64, 9      # steps and features of the synthetic input, and how often each plan is timed
ZONEOUT = 0.1
SLEEP = 2_000_000       # cycles, about a millisecond, that the GPU waits so that all is queued before it begins


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked: "check", whether the last of ``plans`` computes what the first one does, or "time" of all.

    plans    encoded. The first is the present plan. "" is torch's own LSTM, for the loops ``tuned.WHOLE``
    """
    call: Call
    loop: str
    what: str
    plans: tuple

    def encode(self):
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def decode(text):
        fields = json.loads(text)
        return Question(**{**fields, "call": Call(**fields["call"]), "plans": tuple(fields["plans"])})


@dataclasses.dataclass(frozen=True)
class Problem:
    """Synthetic tensors of a call: arguments of ``sequence.forward``, and gradients of y, h_n and c_n."""
    inputs: tuple
    flags: torch.Tensor | None
    batch_sizes: torch.Tensor | None
    zoneout: tuple | None
    gradients: tuple


@functools.lru_cache(maxsize=1)
def problem(call, device):
    """The same ``Problem`` in every process."""
    B, H, D, dtype = call.batch, call.hidden_size, call.directions, call.torch_dtype
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
    uniform = lambda *shape: ((torch.rand(shape, generator=generator, device=device) * 2 - 1) / H ** 0.5).to(dtype)
    x, dy = normal(STEPS, B, INPUTS), normal(STEPS, B, D * H)
    inputs = uniform(D, 4 * H, INPUTS), uniform(D, 4 * H, H), uniform(D, 4 * H), normal(D, B, H), normal(D, B, H)
    flags = batch_sizes = None
    if call.sequences in (FLAGS, PACKED):
        lengths = torch.randint(1, STEPS + 1, (B,), generator=torch.Generator().manual_seed(0))
        lengths = lengths.sort(descending=True).values
        lengths[0] = STEPS
        reset = None
        if call.sequences == FLAGS:
            reset = torch.rand(STEPS, B, generator=generator, device=device) < 0.05
        else:
            live = (torch.arange(STEPS)[:, None] < lengths)
            batch_sizes = live.sum(1)
            x, dy = x[live.to(device)], dy[live.to(device)]
        flags = step_flags(STEPS, B, D, lengths.to(device), reset, device)
    zoneout = (torch.zeros(1, dtype=torch.int64, device=device), ZONEOUT, ZONEOUT) if call.zoneout else None
    return Problem((x, *inputs), flags, batch_sizes, zoneout, (dy, normal(D, B, H), normal(D, B, H)))


@functools.lru_cache(maxsize=1)
def _forward(call, device, plan):
    """(y, kept, gates) of a forward pass for backward, which recomputes the gates."""
    p = problem(call, device)
    y, _, _, kept, gates = op.sequence.forward(*p.inputs, p.flags, plan, True, p.batch_sizes, p.zoneout)
    return y, kept, gates


def plainly(function, *args, **kwargs):
    """Calls ``function``. In its place ``clock`` passes what times it."""
    return function(*args, **kwargs)


def launcher_of(timed):
    """Launches kernels for ``sequence``, those of time loops by ``timed``."""
    def launcher(kernel, *args, **options):
        run = plainly if kernel.__name__ in launch.BEFORE_LOOPS else timed
        return run(launch.launch_kernel, kernel, *args, **options)
    return launcher


@functools.lru_cache(maxsize=2)
def _layer(call, device, plan):
    """A layer with the weights of the ``problem``, by ``plan``; torch's own if that is None."""
    _, w, r, b, _, _ = problem(call, device).inputs
    layer = (torch.nn.LSTM if plan is None else LSTM)(
        INPUTS, call.hidden_size, bidirectional=call.directions == 2, device=device, dtype=call.torch_dtype)
    with torch.no_grad():
        for parameter, values in zip(layer.parameters(), (t for d in range(call.directions) for t in (
                w[d], r[d], b[d], torch.zeros_like(b[d])))):
            parameter.copy_(values)
    if isinstance(layer, LSTM) and plan is not None:
        layer.plan, layer.keep_gates = plan, plan.keeps_gates(STEPS)
    return layer


def _whole(call, training, plan, device, timed):
    """``results`` of a layer as users call it."""
    p, layer = problem(call, device), _layer(call, device, plan)
    x, _, _, _, h0, c0 = (t.detach().requires_grad_(training) for t in p.inputs)

    def run():
        y, (h_n, c_n) = layer(x if p.batch_sizes is None else PackedSequence(x, p.batch_sizes), (h0, c0))
        outputs = y if p.batch_sizes is None else y.data, h_n, c_n
        leaves = [x, h0, c0, *layer.parameters()]
        return *outputs, *(torch.autograd.grad(outputs, leaves, p.gradients) if training else ())
    with torch.set_grad_enabled(training), check.switched(_type_of(call)):
        found = timed(run)
    names = "y", "h_n", "c_n", "dx", "dh0", "dc0", *(f"d{name}" for name, _ in layer.named_parameters())
    return {name: t.detach() for name, t in zip(names, found)}


def _type_of(call):
    """The type of a call as ``check.DTYPES`` names it."""
    return {"float16": "fp16", "bfloat16": "bf16"}.get(call.dtype) or {"tf32": "tf32", "tf32x3": "fp32"}[call.precision]


def results(call, loop, plan, present, device, timed=plainly):
    """What ``plan`` computes of the synthetic call, {name: tensor}; ``timed`` runs the part of it that is timed.

    loop       FORWARD or BACKWARD: that time loop by itself. TRAINING: forward and backward as a whole. One of WHOLE:
               a call of a layer
    present    the plan whose forward pass comes before a backward loop
    """
    if loop in WHOLE.values():
        return _whole(call, loop == WHOLE[True], plan, device, timed)
    p, launcher = problem(call, device), launcher_of(timed)

    def forward(save, keep_gates=False, **more):
        return op.sequence.forward(*p.inputs, p.flags, plan, save, p.batch_sizes, p.zoneout, keep_gates=keep_gates,
                                   **more)

    def backward(y, kept, gates, **more):
        return op.sequence.backward(*p.gradients, *p.inputs, p.flags, y, kept, gates, plan, [True] * 6, p.batch_sizes,
                                    p.zoneout, **more)

    def both():
        y, h_n, c_n, kept, gates = forward(True, plan.keeps_gates(STEPS))
        return y, h_n, c_n, *backward(y, kept, gates)

    outputs, gradients = ("y", "h_n", "c_n"), ("dx", "dw", "dr", "db", "dh0", "dc0")
    if loop == FORWARD:
        return dict(zip(outputs, forward(False, launcher=launcher)))
    if loop == BACKWARD:
        # c is kept as the candidate wants it
        before = dataclasses.replace(present, keep_every=plan.keep_every, backward_plan=present.backward_plan and
                                     dataclasses.replace(present.backward_plan, keep_every=plan.keep_every))
        return dict(zip(gradients, backward(*_forward(call, device, before), launcher=launcher)))
    return dict(zip(outputs + gradients, timed(both)))


def clock(calls, device):
    """Microseconds of what each of ``calls`` times, SAMPLES each, by CUDA events: a list for each call.

    A call takes a function that it calls in the place of ``plainly``, perhaps several times. The calls take turns.
    """
    events = [[] for _ in calls]
    for call, samples in list(zip(calls, events)) * SAMPLES:
        pairs = []

        def timed(function, *args, pairs=pairs, **kwargs):
            torch.cuda._sleep(SLEEP)
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            found = function(*args, **kwargs)
            pair[1].record()
            pairs.append(pair)
            return found
        call(timed)
        samples.append(pairs)
    torch.cuda.synchronize(device)
    return [[sum(1000 * a.elapsed_time(b) for a, b in pairs) for pairs in samples] for samples in events]


def compute(question, device):
    """The answer to a ``Question``."""
    plans = [Plan.decode(text) if text else None for text in question.plans]
    run = functools.partial(results, question.call, question.loop, present=plans[0], device=device)
    if question.what == "time":
        samples = clock([lambda timed, plan=plan: run(plan, timed=timed) for plan in plans], device)
        return dict(outcome="timed", us=[statistics.median(of) / STEPS for of in samples])
    right, got = run(plans[0]), run(plans[-1])
    errors = {name: check.relative_error(got[name], right[name].double()) for name in right}
    wrong = {name: error for name, error in errors.items() if not error <= check.TOLERANCE[_type_of(question.call)]}
    return dict(outcome="wrong", message=", ".join(f"{name} is off by {error:.2g}" for name, error in wrong.items())
                ) if wrong else dict(outcome="right")


def answer(line, device):
    """The answer to an encoded ``Question``; an exception is an answer too."""
    def found():
        with torch.no_grad():
            found = compute(Question.decode(line), device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)      # its errors are this question's
        return found
    return check.told(found)
