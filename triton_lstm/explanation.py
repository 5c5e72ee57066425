"""``explain``: says in words how a layer will run on an input, and why."""
import dataclasses

import torch

from . import tuned, wavefront
from .functional import DTYPES, zoneout_rates
from .kernels.language import VERSION
from .layer import LSTM, _TorchLSTM
from .op import avoided, no_kernels, on_device, plan_or_reason, possible, tf32_allowed
from .plan import H200, SCHEDULES, Limits, PlanError, check_plan, make_plan, step_cycles
from .plan.cost import UNCERTAINTY
from .plan.search import FAST_PRODUCTS
from .projection import too_large_together


def explain(layer: torch.nn.RNNBase, x: torch.Tensor, limits: Limits | None = None) -> str:
    """A text that says by which plan ``layer`` runs on ``x``, where that comes from (arithmetic, ``tune`` or
    ``layer.plan``), what it costs, and why no other schedule is taken.

    layer     a triton_lstm.LSTM, whose ``plan`` is respected; or a torch.nn.LSTM, as if it were converted
    x         the input, (T, B, I), (B, T, I) with ``batch_first``, or (T, I). Only its shape, dtype and device are
              used, so ``torch.empty(..., device="meta")`` will do
    limits    of the device: those of x's CUDA device, or ``triton_lstm.plan.H200``, if None

    Nothing is launched. Bytes of training are those of both ways, keeping the gates and recomputing them: what is saved
    for backward beside x, y and the weights (``Plan.saved_bytes``), and the workspace of backward
    (``Plan.backward_bytes``). With ``proj_size`` o tanh(c), H elements a row and step, is saved too. Cycles are
    predicted by ``triton_lstm.plan.step_cycles``, whose constants are read from machine code; ``python -m bench`` puts
    what it predicts beside what it measures.
    Raises TypeError for another layer or an input that is no tensor, ValueError for one of another shape.
    """
    if not isinstance(layer, (LSTM, _TorchLSTM)):
        raise TypeError(f"layer must be a triton_lstm.LSTM or torch.nn.LSTM, got {type(layer).__name__}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (2, 3) or x.shape[-1] != layer.input_size:
        raise ValueError(f"x must have the shape (T, B, {layer.input_size}), got {tuple(x.shape)}")
    T, B = (x.shape[0], 1) if x.dim() == 2 else (x.shape[1], x.shape[0]) if layer.batch_first else x.shape[:2]
    dtype = x.dtype if x.device.type == "meta" else LSTM._compute_dtype(x)
    D, H, own = 2 if layer.bidirectional else 1, layer.hidden_size, getattr(layer, "plan", None)
    if VERSION is None:
        return f"LSTM({layer.extra_repr()}) on T={T}, B={B}\ntorch's own LSTM computes: Triton is not installed"
    if limits is None and x.is_cuda and (reason := no_kernels(x.device)):
        return f"LSTM({layer.extra_repr()}) on T={T}, B={B}\ntorch's own LSTM computes: {reason}"
    whose, here = "the given limits", limits is None and x.is_cuda
    if limits is None:
        limits, whose = (Limits.of(x.device), f"{x.device}") if x.is_cuda else (H200, "an H200")
    title = (f"LSTM({layer.extra_repr()}) on T={T}, B={B} in {str(dtype).removeprefix('torch.')}, planned for {whose}: "
             f"{limits.multiprocessors} multiprocessors, {_size(limits.shared_memory)} of shared memory a program")
    zoned = any(zoneout_rates(getattr(layer, "zoneout", 0.)))
    single = "\n  without gradients this one step is one launch a layer, for which there is no plan" * (
        T == 1 and own is None and not zoned and not layer.proj_size)
    if dtype not in DTYPES:
        instead = "torch operators compute step by step" if zoned else "torch's own LSTM computes"
        return f"{title}\n{instead}: {dtype}"
    if own and (own.batch, own.hidden_size, own.directions, own.precision == "native") != (
            B, H, D, dtype != torch.float32):
        return f"{title}\nlayer.plan cannot run, it is for another input: {own}"
    if own:
        try:
            check_plan(own, limits, zoned)
        except PlanError as error:
            return f"{title}\nlayer.plan cannot run: {error}"
        plan = own
    else:
        avoid = avoided(x.device) if x.is_cuda else frozenset()
        decide = lambda B, keep_every=None: (
            on_device(B, H, dtype, D, x.device, keep_every, zoned, measure=False) if here else
            plan_or_reason(B, H, dtype, D, limits, tf32_allowed(), keep_every, zoned, avoid))
        plan, reason = decide(B)
        if plan is not None and layer.proj_size:
            reason = too_large_together(decide(1)[0])
        if reason is not None:
            instead = "no plan for the kernels with zoneout" if zoned else "torch's own LSTM computes"
            return f"{title}\n{instead}: {reason}{single}"
    assert plan is not None
    steps, order = plan.forward_steps(T, dtype.itemsize), []
    if layer.num_layers > 1:
        reason = ("there is proj_size" if layer.proj_size else "there is zoneout" if zoned else
                  wavefront.why_not(plan, T, layer.num_layers, limits))
        if reason is None:
            steps = wavefront.chunk_steps(T, plan, limits)
            if not own:
                plan = decide(B, min(plan.keep_every, steps))[0] or plan
            steps = min(plan.forward_steps(T, dtype.itemsize), steps)
        order = [f"  layers run one after the other: {reason}" if reason else "  layers run as a wavefront, side by "
                 f"side, {steps} steps at a time forward and {plan.keep_every} backward, unless there are lengths, "
                 "resets or torch.compile"]
    gates = getattr(layer, "keep_gates", None)
    if gates is None:
        gates = own is None and plan.keeps_gates(T, layer.num_layers)
    if layer.num_layers > 1 and reason is None:
        gates = False
    if gates and D == 2:
        steps = plan.keep_every
    forward, backward = (-(-T // max(n, 1)) for n in (steps, plan.keep_every))
    loops = [plan] if plan.backward is plan else [dataclasses.replace(plan, backward_plan=None), plan.backward]
    which, names = ([""], [None]) if len(loops) == 1 else (["forward ", "backward "], ["forward", "backward"])
    cycles = [step_cycles(loop, limits.multiprocessors, name, limits.multiply_adds) for loop, name in zip(loops, names)]
    matrix, m_bytes = "R", 0
    if layer.proj_size:
        matrix = f"weight_hh weight_hr, {4 * H} x {H} in the place of R,"
        m_bytes = T * B * D * H * dtype.itemsize
    lines = [
        title,
        f"{layer.num_layers} layer(s), each {which[0]}by {'layer.plan, ' if own else ''}{loops[0]}",
        *[f"  {name}by {loop}" for name, loop in zip(which[1:], loops[1:])],
        *_origin(x.device if here else None, own, plan, dtype, limits, zoned),
        f"  {matrix} takes {_size(plan.r_bytes)} a direction",
        *[f"  {name}{loop.groups} group(s) of programs a direction share the rows, {loop.tiles} tile(s) of "
          f"{loop.block_b} rows each" for name, loop in zip(which, loops)],
        *order,
        f"  launches of the time loop a layer: {forward} forward, {backward} backward",
        *["  the first layer's forward loop multiplies x by W itself"] * plan.multiplies_input(layer.input_size),
        *[f"  a step of a layer's {name}time loop: {n:.0f} cycles predicted, {n / limits.mhz:.2f} us at "
          f"{limits.mhz} MHz" for name, n in zip(which, cycles)],
        f"  cycles: up to {UNCERTAINTY:g} times more or less than bounds from machine code; nothing is measured",
        _memory(gates, *((_size(plan.saved_bytes(T, dtype.itemsize if keeps else None) + m_bytes),
                          _size(plan.backward_bytes(T, layer.input_size, dtype.itemsize, zoned, keeps)))
                         for keeps in (True, False)))]
    lines += [f"  not {schedule}: {_why_not(schedule, plan, dtype, limits, zoned)}"
              for schedule in SCHEDULES if schedule != plan.schedule]
    return "\n".join(lines) + single


def _origin(device, own, plan, dtype, limits, zoned):
    """The lines on where ``plan`` comes from. device: for which it is; None where ``limits`` stand for one."""
    if own:
        return ["  given, as layer.plan"]
    call = tuned.Call.of(plan.batch, plan.hidden_size, dtype, plan.directions, plan.precision, tuned.PADDED, zoned)
    known = device and tuned.known(device)
    loops = known.calls.get(str(call)) if known else None
    if not loops:
        return ["  chosen by arithmetic, by predicted cycles" + (
            "; triton_lstm.tune measures which is the fastest" if device else "")]
    try:
        possible(loops, plan, plan.batch, None, limits, zoned, avoided(device))
    except ValueError as error:
        return [f"  chosen by arithmetic: what was measured is not possible any more: {error}"]
    return [f"  measured, {loop}: {entry}" + ("" if entry.plan else
            ", which computes such calls in eager mode") for loop, entry in loops.items()]


def _memory(gates, keeping, recomputing):
    """The line on memory: (bytes saved a layer, bytes of workspace) of both ways, the one that is taken first."""
    kept, workspace = keeping if gates else recomputing
    other, its_workspace = recomputing if gates else keeping
    return ("  training " + ("keeps the gates and c of every step: " if gates else "recomputes the gates: ")
            + f"{kept} saved a layer, {workspace} of workspace in backward; "
            + ("recomputing them" if gates else "keeping them") + f" would take {other} and {its_workspace}")


def _why_not(schedule, taken, dtype, limits, zoned):
    """The reason why ``taken`` has another schedule: no plan of ``schedule`` fits, or what it would cost."""
    try:
        other = make_plan(taken.batch, taken.hidden_size, dtype, taken.directions, limits=limits, tf32=tf32_allowed(),
                          schedule=schedule, zoneout=zoned)
    except PlanError as error:
        reasons = str(error).split("; ")
        of_it = [reason.removeprefix(f"{schedule}: ") for reason in reasons if reason.startswith(f"{schedule}: ")]
        return "; ".join(dict.fromkeys(of_it or reasons))
    cycles = lambda plan: f"{step_cycles(plan, limits.multiprocessors, None, limits.multiply_adds):.0f}"
    wherever = limits.multiply_adds >= FAST_PRODUCTS
    if schedule == "resident" and wherever:
        return "possible, and chosen where no plan is given: its programs wait for nobody"
    text = f"possible, with {other.programs} programs for an R and {other.tiles} tile(s) of rows each"
    if other.streamed_bytes:
        text += f", {_size(other.streamed_bytes)} of R read from L2 by a program at every step"
    if taken.schedule == "resident" and wherever:
        return f"{text}; resident is taken wherever it fits"
    return f"{text}: {cycles(other)} cycles predicted, {cycles(taken)} as planned"


def _size(count):
    power = min(max(int(count).bit_length() - 1, 0) // 10, 3)
    return f"{count / 1024 ** power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
