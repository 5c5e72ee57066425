"""``tune``: measures which plans are the fastest on this GPU, and remembers them (``tuned``).

Kernels are compiled and timed in other processes (``contest``): the caller's process does nothing on the GPU, so a
kernel that hangs or traps does not end it.
"""
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import warnings

import torch
from torch.nn.utils.rnn import PackedSequence

from . import cachefile, check, op, runner, tuned
from .contest import INPUTS, STEPS, Question
from .kernels import waiting
from .kernels.offline import compile_apart
from .plan import Plan, PlanError, combined, contenders, precision_for
from .table import aligned
from .tuned import BACKWARD, FORWARD, LOOPS, PACKED, PADDED, TRAINING, WHOLE, Call, Entry

log = logging.getLogger("triton_lstm")
SHARE, WAIT_LIMIT = 60., "2"    # seconds for an answer of the other process; after which its kernels give up waiting
COMPILE_S = 600.                # for one plan
GAIN = 0.02                     # which another plan must save at least, of the time of the plan by arithmetic
KEEP_EVERY = 32, 16             # that are tried beside the default: at most half of STEPS, for several chunks


def why_not(device):
    """The reason why nothing can be measured on ``device`` now; None if it can."""
    if op.interpreted():
        return "Triton's interpreter runs the kernels, whose time says nothing"
    if tuned.place(device) is None:
        return f"plans are measured on CUDA devices, got {device}"
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return "torch.compile or a dispatch mode is at work"
    if op.transformed():
        return "a transform of torch.func is at work"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def tune(model, x, *, allow_torch: bool = False) -> None:
    """Measure which plans are the fastest for what ``model`` calls on ``x``, remember them for this and later
    processes, and print a table with the gain over the plans by arithmetic.

    model    a ``triton_lstm.LSTM``, or a module or function that has such layers or calls ``triton_lstm.lstm``
    x        its input: a tensor or a packed sequence, a tuple of arguments, or a dict of keyword arguments; or a list
             of such inputs
    allow_torch  whether whole calls of torch's own LSTM are measured too, with and without packed sequences. Where they
             are faster, a ``triton_lstm.LSTM`` uses it from then on, after one warning, as long as it is called
             eagerly, and whether gradients are enabled is as it was measured

    ``model`` is called once with each input, as it is: in the present mode, and with gradients if they are enabled.
    Under ``torch.no_grad()`` only forward loops are measured. Calls are told apart by H, directions, batch rows in
    tiles of 16, dtype, TF32, zoneout, and whether there are lengths, resets or a packed sequence. Their steps do not
    matter. For each, candidate plans run over 64 steps of random data, each time loop by itself, and after them ways
    to keep less for backward. A candidate whose results are not those of the present plan, or that fails, is left out
    with a message. Another plan is chosen if it saves 2 % or more.

    What is remembered already is printed and not measured again; ``tune.clear()`` forgets all. ``triton_lstm.explain``
    and ``python -m triton_lstm tuned`` say what is remembered. Compiling takes most of the time, seconds to minutes, on
    all cores. Of several processes with equal GPUs, as in DDP, one measures and the others wait for it.

    Raises ValueError where there is nothing to measure: no call that an automatic plan runs, or one that is not on a
    CUDA device; and RuntimeError under torch.compile, torch.func, or while a CUDA graph is captured.
    """
    if tuned.recorded is not None:
        raise RuntimeError("tune is at work already")
    inputs = x if isinstance(x, list) else [x]
    if not inputs:
        raise ValueError("tune needs an input, got an empty list")
    tuned.recorded = {}
    try:
        for given in inputs:
            if isinstance(given, dict):
                model(**given)
            else:
                model(*(given if isinstance(given, tuple) and not isinstance(given, PackedSequence) else [given]))
        calls = tuned.recorded
    finally:
        tuned.recorded = None
    if not calls:
        raise ValueError("there is nothing to measure: no call of a triton_lstm layer that an automatic plan runs. On "
                         "CPU tensors, in float64, and of one step without gradients none does")
    for _, device in calls:
        if (reason := why_not(device)) is not None:
            raise (ValueError if op.interpreted() or tuned.place(device) is None else RuntimeError)(
                f"there is nothing to measure: {reason}")
    loops = *_loops(), *([WHOLE[torch.is_grad_enabled()]] if allow_torch else [])
    for device in dict.fromkeys(device for _, device in calls):
        of_device = [call for call, of in calls if of == device]
        measure(of_device, loops, device, print)
        print(describe({str(call): known_of(call, device) for call in of_device}))


tune.clear = tuned.clear        # pyright: ignore[reportFunctionMemberAccess]


def _loops():
    """What is measured for a call now."""
    return LOOPS if torch.is_grad_enabled() else (FORWARD,)


_noticed = set()        # calls that were measured, or cannot be


def notice(*call):
    """What ``op.on_device`` tells of a call before its plan is chosen: the arguments of ``tuned.Call.of`` without the
    precision, and the device. ``tune`` records it. With ``backends.benchmark`` it is measured, if it is new."""
    batch, hidden_size, dtype, directions, device, zoneout, sequences = call
    key = *call, op.tf32_allowed(), torch.is_grad_enabled()
    if tuned.recorded is None and key in _noticed:
        return
    try:
        of = Call.of(batch, hidden_size, dtype, directions, precision_for(dtype, op.tf32_allowed()), sequences, zoneout)
    except PlanError:
        return
    if tuned.recorded is not None:
        tuned.recorded[of, device] = None
    elif why_not(device) is None:
        _noticed.add(key)
        try:
            measure([of], _loops(), device, log.warning)
        except Exception as error:      # a call goes on without what could not be measured
            warnings.warn(f"triton_lstm could not measure plans for {of}: {error}", stacklevel=4)
        log.info("measured plans:\n%s", describe({str(of): known_of(of, device)}))


tuned.notice = notice


def known_of(call, device):
    """{loop: Entry} of what is remembered of a call."""
    known = tuned.known(device)
    return known.calls.get(str(call), {}) if known else {}


def measure(calls, loops, device, say):
    """Measure those of ``loops`` that are not known of ``calls`` on a device, and remember them. ``say`` takes messages
    about candidates that are left out. Of several processes one measures at a time, and the others then know."""
    # torch's own LSTM has neither lengths nor zoneout
    comparable = lambda call: call.sequences in (PADDED, PACKED) and not call.zoneout

    def missing():
        found = {call: [loop for loop in loops if loop not in known_of(call, device) and (
            loop in LOOPS or comparable(call))] for call in calls}
        return {call: of for call, of in found.items() if of}
    if not missing():
        return
    with cachefile.locked("tuning.lock"):
        tuned.read_again()
        if not (left := missing()):
            return
        limits, avoid, plans = op.limits_of(device), op.avoided(device), {}
        assert limits is not None       # only the interpreter has none
        for call in left:
            try:
                plans[call] = contenders(call.batch, call.hidden_size, call.torch_dtype, call.directions, limits=limits,
                                         tf32=call.precision == "tf32", zoneout=call.zoneout, avoid=avoid)
            except PlanError as error:          # torch's own LSTM computes it
                say(f"{call}: {error}")
        if not plans:
            return
        compiling = list(dict.fromkeys(job for call, of in plans.items() for job in jobs(call, of, left[call])))
        steps = len(compiling) + sum(1 + len(ways(of[FORWARD][0]) if loop == TRAINING else of.get(loop, WHOLE))
                                     for call, of in plans.items() for loop in left[call])
        with progress(steps) as step:
            for _ in compiled(compiling, device):
                step()
            with worker(device) as ask:
                for call, of in plans.items():
                    found = contest_of(call, of, left[call], known_of(call, device), ask, say, step)
                    if found:
                        tuned.remember(tuned.place(device), call, found)


def jobs(call, plans, loops):
    """What ``compiled`` takes for the ``contenders`` of a call, as text. A job compiles both loops of a plan, so the
    n-th of either loop are one job."""
    forwards, backwards = plans[FORWARD], plans[BACKWARD] if BACKWARD in loops else []
    options = dict(flagged=call.sequences == tuned.FLAGS, packed=call.sequences == tuned.PACKED,
                   zoneout="drawn" if call.zoneout else None, inputs=INPUTS)
    for forward, backward in itertools.zip_longest(forwards, backwards):
        plan = combined(forward or forwards[0], backward or forwards[0].backward)
        yield json.dumps([plan.encode(), call.dtype, options])


def compiled(jobs, device):
    """Compile ``jobs`` into Triton's cache, on all cores, and yield as each is done. What fails will fail again, with
    its reason, where it is compared.

    The pool of processes belongs to a process of its own, because a pool imports the program that the user runs.
    """
    major, minor = torch.cuda.get_device_capability(device)
    process = runner.Worker(*check.child("compile", str(10 * major + minor)))
    try:
        if process.answer(SHARE) is None:
            return
        process.ask(json.dumps(jobs))
        for _ in jobs:
            if process.answer(COMPILE_S) is None:
                return
            yield
    except EOFError as error:
        log.warning("compiling beforehand failed: %s", error)
    finally:
        process.kill()


def compile_jobs(line, arch):
    """The answers of the process that ``compiled`` starts."""
    of = [(Plan.decode(plan), getattr(torch, dtype), options) for plan, dtype, options in map(json.loads,
                                                                                             json.loads(line))]
    for _, error in compile_apart(of, arch):
        yield dict(error=error and str(error))


@contextlib.contextmanager
def worker(device):
    """A function that asks a ``Question`` of a process on ``device``, which is started again after one that ends it."""
    torch.cuda.synchronize(device)          # what the caller has queued would run beside what is timed
    command, environment = check.child("contest", str(device.index))
    environment[waiting.VARIABLE] = os.environ.get(waiting.VARIABLE, WAIT_LIMIT)
    asked = []

    def cases():
        while True:
            yield asked[-1], asked[-1].encode()
    answers = runner.run(cases(), command, float("inf"), SHARE, environment)

    def ask(question):
        asked[:] = [question]
        return next(answers)[1]
    try:
        yield ask
    finally:
        answers.close()


@contextlib.contextmanager
def progress(steps):
    """A function to call after each of so many steps. It draws a bar with the time left if tqdm is installed, on a
    terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=steps, desc="triton_lstm measures plans", disable=None) as bar:
        yield bar.update


def name_of(plan, loop):
    """A candidate in words. None is torch's own LSTM."""
    if loop in WHOLE.values():
        return "triton_lstm" if plan else "torch's own LSTM"
    if loop == TRAINING:
        return "keeping the gates" if plan.keeps_gates(STEPS) else f"recomputing {plan.keep_every} steps at a time"
    plan = plan.backward if loop == BACKWARD else plan
    return (f"{plan.variant}, {plan.programs} x {plan.groups} x {plan.tiles} programs, {plan.block_h} units, "
            f"{plan.block_b} rows")


def contest_of(call, plans, loops, known, ask, say, step):
    """{loop: Entry} of those of ``loops`` that could be measured. plans: the ``contenders`` of the call. known: the
    entries that there are already."""
    found = {}
    for loop in loops:
        if loop in (FORWARD, BACKWARD):
            of_loop = plans[loop]
        else:
            try:
                plan = tuned.plan_of({**known, **found}, plans[FORWARD][0], call.batch)
            except ValueError:          # what was known is of another layer
                plan = tuned.plan_of(found, plans[FORWARD][0], call.batch)
            of_loop = ways(plan) if loop == TRAINING else [plan, None]
        if (entry := contest(call, loop, of_loop, ask, say, step)) is not None:
            found[loop] = entry
    return found


def every(plan, steps):
    """``plan`` with this ``keep_every``."""
    return dataclasses.replace(plan, keep_every=steps, backward_plan=plan.backward_plan and dataclasses.replace(
        plan.backward_plan, keep_every=steps))


def ways(plan):
    """Plans that keep other things for backward, what ``plan`` does by default first: the gates, or c at other steps.
    In two directions forward goes ``keep_every`` steps at a time where it keeps the gates, so fewer would slow that."""
    fewer = [steps for steps in KEEP_EVERY if steps < plan.keep_every and plan.directions == 1]
    return [plan] * plan.keeps_gates(STEPS) + [
        dataclasses.replace(every(plan, steps), gates_steps=0) for steps in (plan.keep_every, *fewer)]


def contest(call, loop, plans, ask, say, step):
    """The ``Entry`` of one loop: the fastest of ``plans`` among those that compute what the first does. None if the
    first fails or nothing can be timed."""
    right, text = {}, lambda plan: plan.encode() if plan else ""
    for plan in plans:
        found = ask(Question(call, loop, "check", (text(plans[0]), text(plan))))
        step()
        if found["outcome"] == "right":
            right[name_of(plan, loop)] = plan
            continue
        why = "; ".join(filter(None, [found["outcome"], found.get("message"), found.get("record")]))
        say(f"{call}, {loop}: {name_of(plan, loop)} is left out: {why}. `python -m triton_lstm check` looks closer")
        if plan is plans[0]:
            return None
    found = ask(Question(call, loop, "time", tuple(map(text, right.values()))))
    step()
    if found["outcome"] != "timed":
        say(f"{call}, {loop}: not timed: {found['outcome']}; {found.get('message')}")
        return None
    us = dict(zip(right, found["us"]))
    chosen = fastest(us)
    plan = right[chosen] if loop != TRAINING else way(plans[0], right, us)
    return Entry(text(plan), chosen, us)


def fastest(us):
    """The name of the fastest candidate of ``us``; of the first one, unless another saves ``GAIN``."""
    default, best = next(iter(us)), min(us, key=lambda name: us[name])
    return best if us[best] <= (1 - GAIN) * us[default] else default


def way(default, plans, us):
    """``default`` with the ``keep_every`` and ``gates_steps`` that were measured to be the fastest: short sequences
    may keep the gates, long ones recompute them."""
    recomputing = {name: us[name] for name, plan in plans.items() if not plan.keeps_gates(STEPS)}
    steps = plans[fastest(recomputing)].keep_every if recomputing else default.keep_every
    loses = default.keeps_gates(STEPS) and fastest(us) in recomputing
    keeping = 0 if loses else default.keep_every
    return dataclasses.replace(every(default, steps), gates_steps=None if keeping == steps else keeping)


def describe(calls):
    """A table of ``calls``, {text of a call: {loop: Entry}}."""
    rows = [["call", "loop", "by arithmetic", "us a step", "chosen", "us a step", "gain"]]
    for call, loops in calls.items():
        for loop, entry in loops.items():
            default = next(iter(entry.us))
            rows.append([call, loop, default, f"{entry.us[default]:.2f}", entry.chosen, f"{entry.us[entry.chosen]:.2f}",
                         f"{100 * entry.gain:.0f} %"])
            call = ""
    return aligned(rows)
