"""The custom operators ``triton_lstm::lstm`` and its backward: fake implementations, autograd and vmap.

torch.compile and torch.export see opaque operators, with tensors for inputs and outputs. The plan is passed as a
string. An empty one asks for the automatic plan, which is chosen when the shapes are known.

First derivatives are kernels. Higher ones differentiate the equations in ``reference.py`` twice. That is right to any
order, but it goes step by step and keeps every activation.
"""
import contextlib
import functools
import inspect
import warnings

import torch
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]

from . import backends, faults, tuned
from .kernels import launch, sequence
from .kernels.precision import fp32_precision
from .kernels.rows import lengths_and_reset
from .plan import Limits, Plan, PlanError, check_plan, make_plan
from .plan.limits import none_on
from .plan.search import precision_for
from .reference import lstm_reference, packed_reference, zoneout_shares

STEP = "one step"       # the kernel for T = 1 without gradients, as ``faults`` and ``check`` name it


def interpreted():
    """Whether the kernels run in Triton's interpreter."""
    return sequence.INTERPRET


@functools.lru_cache
def limits_of(device):
    """The limits of a CUDA device; None if the kernels run in the interpreter, which has no limits."""
    return None if interpreted() else Limits.of(device)


@functools.lru_cache
def no_kernels(device):
    """Why no kernel runs on a device that torch calls CUDA; None if kernels do."""
    return none_on(device)


def tf32_allowed():
    """Whether torch lets nn.LSTM multiply fp32 in TF32 on CUDA, which is its default.

    False in the interpreter, where results are compared with those of a CPU.
    """
    if interpreted():
        return False
    return torch.backends.cudnn.allow_tf32 if fp32_precision is None else fp32_precision("cuda", "rnn") == "tf32"


def avoided(device):
    """The kernels that automatic plans on ``device`` avoid, as ``make_plan`` takes them."""
    return faults.known(device) if device.type == "cuda" else frozenset()


@functools.lru_cache
def plan_or_reason(batch, hidden_size, dtype, directions, limits, tf32, keep_every=None, zoneout=False,
                   avoid=frozenset()):
    """(plan, None) by arithmetic of a call that names no plan, or (None, reason) where the kernels cannot run it."""
    try:
        return make_plan(batch, hidden_size, dtype, directions, limits=limits, tf32=tf32, keep_every=keep_every,
                         zoneout=zoneout, avoid=avoid), None
    except PlanError as error:
        return None, str(error)


def possible(loops, arithmetic, batch, keep_every, limits, zoneout, avoid):
    """``tuned.plan_of`` the first four arguments. Raises ValueError where it cannot run, or must not."""
    plan = tuned.plan_of(loops, arithmetic, batch, keep_every)
    check_plan(plan, limits, zoneout)
    for of_loop, loop in ((plan, "forward"), (plan.backward, "backward")):
        if (of_loop.variant, loop, of_loop.precision) in avoid:
            raise PlanError(f"the check found {of_loop.variant} {loop} wrong")
    return plan


@functools.lru_cache
def _remembered(known, batch, hidden_size, dtype, directions, limits, tf32, keep_every, zoneout, avoid, sequences):
    """(plan, None) from what is ``known`` (``tuned.Remembered``) of a call, or what ``plan_or_reason`` says: where
    nothing is known and, with a warning, where the plan is not possible any more."""
    arithmetic = plan_or_reason(batch, hidden_size, dtype, directions, limits, tf32, keep_every, zoneout, avoid)
    if arithmetic[0] is None:
        return arithmetic
    call = tuned.Call.of(batch, hidden_size, dtype, directions, arithmetic[0].precision, sequences, zoneout)
    loops = known.calls.get(str(call))
    if loops is None:
        return arithmetic
    try:
        return possible(loops, arithmetic[0], batch, keep_every, limits, zoneout, avoid), None
    except ValueError as error:
        warnings.warn(f"triton_lstm ignores the plan that was measured for {call}: {error}. triton_lstm.tune.clear() "
                      "forgets what was measured", stacklevel=2)
        return arithmetic


def sequences_of(flagged, packed):
    """``tuned.Call.sequences`` of a call. flagged: whether it has lengths, resets or step flags."""
    return tuned.PACKED if packed else tuned.FLAGS if flagged else tuned.PADDED


@functools.lru_cache
def _torch_is_faster(known, plan, dtype, sequences, zoneout, training):
    """The reason why torch's own LSTM computes a call that ``plan`` could run; None if it does not."""
    call = tuned.Call.of(plan.batch, plan.hidden_size, dtype, plan.directions, plan.precision, sequences, zoneout)
    entry = known.calls.get(str(call), {}).get(tuned.WHOLE[training])
    return None if entry is None or entry.plan else f"it was measured to be faster in {tuned.WHOLE[training]}, {call}"


def on_device(batch, hidden_size, dtype, directions, device, keep_every=None, zoneout=False, sequences=tuned.PADDED,
              or_torch=False, measure=True):
    """(plan, None) of a call that names no plan, or (None, reason) where the kernels do not compute it: as measured on
    the device, else by arithmetic, in the present state of torch's switch for TF32. This is decided here and nowhere
    else.

    or_torch    whether torch's own LSTM may compute instead, where it was measured to be faster
    measure     whether with ``backends.benchmark`` what is not known is measured now. Not where a compiled graph, a
                capture or a transform may call
    """
    if (backends.benchmark or tuned.recorded is not None) and measure:
        tuned.notice(batch, hidden_size, dtype, directions, device, zoneout, sequences)
    try:
        limits = limits_of(device)
    except PlanError as error:          # a GPU without kernels
        return None, str(error)
    tf32, avoid, known = tf32_allowed(), avoided(device), tuned.known(device)
    if known is None:
        return plan_or_reason(batch, hidden_size, dtype, directions, limits, tf32, keep_every, zoneout, avoid)
    plan, reason = _remembered(known, batch, hidden_size, dtype, directions, limits, tf32, keep_every, zoneout, avoid,
                               sequences)
    if or_torch and plan is not None:
        reason = _torch_is_faster(known, plan, dtype, sequences, zoneout, torch.is_grad_enabled())
    return (plan, None) if reason is None else (None, reason)


def plan_for(x, h0, text, keep_every, zoneout, sequences=tuned.PADDED):
    """The plan that runs x from the state h0 (D, B, H): the decoded ``text``, or the automatic plan if it is empty.

    Raises ValueError if the plan is for another layer or input, PlanError if no plan can run.
    """
    directions, batch, hidden_size = h0.shape
    if not text:
        plan, reason = on_device(batch, hidden_size, x.dtype, directions, x.device, keep_every, zoneout, sequences,
                                 measure=False)
        if plan is None:
            raise PlanError(reason)
        return plan
    plan = Plan.decode(text)
    if (plan.batch, plan.hidden_size, plan.directions) != (batch, hidden_size, directions):
        raise ValueError(f"the plan is for batch {plan.batch}, hidden_size {plan.hidden_size}, {plan.directions} "
                         f"direction(s), the call has {batch}, {hidden_size}, {directions}")
    if (plan.precision == "native") != (x.dtype != torch.float32):
        raise ValueError(f"the plan computes in {plan.precision}, the input is {x.dtype}")
    check_plan(plan, limits_of(x.device), zoneout)
    return plan


def one_step_precision(batch, dtype, device, inputs, hidden_size, directions):
    """How the kernel for one step without gradients computes products; None if the check found it wrong on the device,
    or if it would read too many bytes (``launch.step_pays``). inputs: features of the widest layer."""
    if not launch.step_pays(batch, inputs, hidden_size, directions, dtype.itemsize):
        return None
    precision = precision_for(dtype, tf32_allowed())
    return None if (STEP, "forward", precision) in avoided(device) else precision


def _zoneout(seed, rate_h, rate_c):
    """The argument ``zoneout`` of the kernels and of ``reference``: None if both rates are 0."""
    return (seed, rate_h, rate_c) if rate_h or rate_c else None


_NO_CONTEXT = contextlib.nullcontext()


def autocasts(x):
    """Whether autocast is on for the device of x. It is off for all, most often, and torch is quick to tell that."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def without_autocast(x):
    """The types are chosen already. Entering torch's context takes several microseconds, also where autocast is off."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else _NO_CONTEXT


def _lstm(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, h0: torch.Tensor,
          c0: torch.Tensor, flags: torch.Tensor | None, batch_sizes: torch.Tensor | None, plan: str, keep_every: int,
          save: bool, gates_steps: int = 0, seed: torch.Tensor | None = None, rate_h: float = 0.,
          rate_c: float = 0.) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if (not (save or plan or rate_h or rate_c) and flags is None and batch_sizes is None and len(x) == 1
            and (precision := one_step_precision(
                x.shape[:-1].numel(), x.dtype, x.device, x.shape[-1], r.shape[-1], len(r)))):
        weights = [(w[d], r[d], None if b is None else b[d], None) for d in range(len(r))]
        y, h_n, c_n = sequence.one_step(x, weights, h0, c0, h0.shape, len(r), precision)
        return y, h_n, c_n, x.new_empty(0, *h0.shape, dtype=torch.float32), x.new_empty(0, 4 * h0.shape[-1])
    with without_autocast(x):
        zoneout = _zoneout(seed, rate_h, rate_c)
        chosen = plan_for(x, h0, plan, keep_every, zoneout is not None,
                          sequences_of(flags is not None, batch_sizes is not None))
        keep_gates = len(x if batch_sizes is None else batch_sizes) <= gates_steps
        return sequence.forward(x, w, r, b, h0, c0, flags, chosen, save, batch_sizes, zoneout, keep_gates=keep_gates)


lstm_op = torch.library.custom_op("triton_lstm::lstm", _lstm, mutates_args=())


@lstm_op.register_fake
def _(x, w, r, b, h0, c0, flags, batch_sizes, plan, keep_every, save, gates_steps=0, seed=None, rate_h=0.,
      rate_c=0.):
    T = (x if batch_sizes is None else batch_sizes).shape[0]
    D, B, H = h0.shape
    # 1 or 0. A comparison of T would tie the graph to a range of lengths.
    keeps = torch.sym_min(gates_steps // torch.sym_max(T, 1), 1)
    kept = keeps * T + (1 - keeps) * (torch.sym_max(T - 1, 0) // keep_every) if save else 0
    rows = keeps * D * (x.shape[0] if batch_sizes is not None else T * B) if save else 0
    return (x.new_empty(*x.shape[:-1], D * H), x.new_empty(D, B, H), x.new_empty(D, B, H),
            x.new_empty(kept, D, B, H, dtype=torch.float32), x.new_empty(rows, 4 * H))


def _lstm_backward(dy: torch.Tensor | None, dh_n: torch.Tensor | None, dc_n: torch.Tensor | None, x: torch.Tensor,
                   w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, h0: torch.Tensor, c0: torch.Tensor,
                   flags: torch.Tensor | None, batch_sizes: torch.Tensor | None, y: torch.Tensor, kept: torch.Tensor,
                   gates: torch.Tensor, plan: str, keep_every: int, needs: list[bool],
                   seed: torch.Tensor | None = None, rate_h: float = 0., rate_c: float = 0.
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    zoneout = _zoneout(seed, rate_h, rate_c)
    chosen = plan_for(x, h0, plan, keep_every, zoneout is not None,
                      sequences_of(flags is not None, batch_sizes is not None))
    with without_autocast(x):
        gradients = sequence.backward(dy, dh_n, dc_n, x, w, r, b, h0, c0, flags, y, kept, gates, chosen, needs,
                                      batch_sizes, zoneout)
    dx, dw, dr, db, dh0, dc0 = (x.new_empty(0) if g is None else g for g in gradients)
    return dx, dw, dr, db, dh0, dc0


lstm_backward_op = torch.library.custom_op("triton_lstm::lstm_backward", _lstm_backward, mutates_args=())


@lstm_backward_op.register_fake
def _(dy, dh_n, dc_n, x, w, r, b, h0, c0, flags, batch_sizes, y, kept, gates, plan, keep_every, needs, seed=None,
      rate_h=0., rate_c=0.):
    shapes = [x.shape, w.shape, r.shape, w.shape[:2], h0.shape, c0.shape]
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.plan, ctx.keep_every, _, _, seed, rate_h, rate_c = inputs
    ctx.rates = rate_h, rate_c
    y, _, _, kept, gates = output
    ctx.save_for_backward(*tensors, y, kept, gates, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh_n, dc_n, *_):
    needs = list(ctx.needs_input_grad[:6])
    if dy is None and dh_n is None and dc_n is None:
        return ()
    *saved, seed = ctx.saved_tensors
    gradients = differentiable(lstm_backward_op, dy, dh_n, dc_n, *saved, ctx.plan, ctx.keep_every, needs, seed,
                                                 *ctx.rates)
    return tuple(g if need else None for g, need in zip(gradients, needs))


def reference_backward(dy, dh_n, dc_n, x, w, r, b, h0, c0, flags=None, batch_sizes=None, keep=None):
    """The gradients of ``lstm_reference`` with respect to x, w, r, b, h0 and c0, in differentiable torch operators.

    Packed inputs have ``batch_sizes`` as in ``lstm``, padded ones step flags or None. keep: see ``lstm_reference``.
    """
    inputs = (x, w, r, h0, c0) if b is None else (x, w, r, h0, c0, b)
    if batch_sizes is not None:
        reference = functools.partial(packed_reference, batch_sizes=batch_sizes, keep=keep)
    else:
        lengths, reset = (None, None) if flags is None else lengths_and_reset(flags)
        reference = functools.partial(lstm_reference, lengths=lengths, reset=reset, keep=keep)
    _, vjp, *_ = torch.func.vjp(lambda x, w, r, h0, c0, b=None: reference(x, w, r, b, h0, c0), *inputs)
    dx, dw, dr, dh0, dc0, *db = vjp((dy, dh_n, dc_n))
    return dx, dw, dr, *(db or [None]), dh0, dc0


def reference_double_backward(cotangents, inputs, flags=None, batch_sizes=None, zoneout=None):
    """The vector-Jacobian product of ``reference_backward``: gradients for its first nine arguments, ``inputs``.

    ``cotangents`` belong to the six results; None stands for zero. The gradient of an input that is None is None.
    float16 and bfloat16 are computed in fp32. Products follow ``torch.backends.cuda.matmul``, so fp32 is TF32 only if
    that allows it.
    """
    x, h0 = inputs[3], inputs[7]
    D, B, H = h0.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    T = (x if batch_sizes is None else batch_sizes).shape[0]
    keep = zoneout and zoneout_shares(zoneout, T, B, D, H, x.new_empty(0, dtype=dtype))
    present = [i for i, t in enumerate(inputs) if t is not None]
    shapes = (*x.shape[:-1], D * H), h0.shape, h0.shape
    missing = {i: x.new_zeros(shape, dtype=dtype) for i, shape in enumerate(shapes)}

    def backward(*tensors):
        given = dict(zip(present, tensors))
        gradients = reference_backward(*(given.get(i, missing.get(i)) for i in range(9)), flags=flags,
                                       batch_sizes=batch_sizes, keep=keep)
        return tuple(g for g, v in zip(gradients, cotangents) if v is not None)

    with torch.autocast(x.device.type, enabled=False):
        _, vjp, *_ = torch.func.vjp(backward, *(inputs[i].to(dtype) for i in present))
        results = dict(zip(present, vjp(tuple(v.to(dtype) for v in cotangents if v is not None))))
        return tuple(results[i].to(x.dtype) if i in results else None for i in range(9))


def _setup_double_context(ctx, inputs, output):
    *_, seed, rate_h, rate_c = inputs
    ctx.rates = rate_h, rate_c
    before_y = list(inspect.signature(_lstm_backward).parameters).index("y")
    ctx.save_for_backward(*inputs[:before_y], seed)         # y, kept and gates are functions of these
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    if all(v is None for v in cotangents):
        return ()
    *inputs, flags, batch_sizes, seed = ctx.saved_tensors
    zoneout = _zoneout(seed, *ctx.rates)
    return reference_double_backward(cotangents, inputs, flags, batch_sizes, zoneout)


def _for_each(op):
    """The rule for vmap of ``op``: one call for each member, because a program holds the weights of one."""
    def rule(info, in_dims, *args):
        members = [op(*(a if dim is None or not isinstance(a, torch.Tensor) else a.select(dim, n)
                        for a, dim in zip(args, in_dims))) for n in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*members))), (0,) * len(members[0])
    return rule


def eager_style(function):
    """An autograd.Function like ``function``, but with a forward that takes ctx. With a setup_context, which torch.func
    needs, torch binds the arguments to their names at each call, which takes longer than some kernels."""
    def forward(ctx, *args):
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output
    return type(function.__name__, (torch.autograd.Function,), dict(
        forward=staticmethod(forward), backward=staticmethod(function.backward)))


_functions, _eager = {}, {}


def register(op, function, name, setup, formula, vmap):
    """Give the custom operator ``op`` its backward formula and its vmap rule.

    function    the Python function that ``op`` calls
    name        of the autograd.Function that ``differentiable`` calls in place of ``op``
    setup       the setup_context of both
    formula     (ctx, *gradients) -> gradients of the first inputs. The gradients of the other inputs are None
    vmap        the rule for ``op``
    """
    inputs = len(inspect.signature(function).parameters)

    def gradients(ctx, *outputs):
        found = formula(ctx, *outputs)
        return (*found, *(None,) * (inputs - len(found)))

    op.register_autograd(gradients, setup_context=setup)
    op.register_vmap(vmap)
    rules = dict(setup_context=staticmethod(setup), backward=staticmethod(gradients), generate_vmap_rule=True)
    made = lambda forward: type(name, (torch.autograd.Function,), dict(rules, forward=staticmethod(forward)))
    _functions[op], _eager[op] = made(op), (function, eager_style(made(function)))


register(lstm_op, _lstm, "LSTM", _setup_context, _backward, _for_each(lstm_op))
register(lstm_backward_op, _lstm_backward, "LSTMBackward", _setup_double_context, _double_backward,
         _for_each(lstm_backward_op))


def transformed():
    """Whether the caller runs inside a transform of torch.func (grad, vmap, ...)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def plain(*tensors):
    """Whether autograd alone sees what is done to ``tensors``: they are torch's own, and no compiler, tracer, transform
    or dispatch mode is at work."""
    return (_PLAIN.issuperset(map(type, tensors)) and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active() and not torch._C._len_torch_dispatch_stack()
            and torch._C._get_tracing_state() is None)


def batched(*tensors):
    """Whether ``is_grads_batched`` runs over ``tensors``, which have the types of others."""
    return any(map(is_legacy_batchedtensor, [t for t in tensors if t is not None]))


def differentiable(op, *args):
    """``op`` of ``args``, with gradients to any order.

    Plain tensors need no operator, whose dispatch takes longer than some layers. torch.func takes autograd.Functions
    and refuses what custom operators register for autograd. Everything else sees the operator.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if plain(*tensors) and not batched(*tensors):
        function, differentiated = _eager[op]
        needed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return differentiated.apply(*args) if needed else function(*args)
    return (_functions[op].apply if transformed() else op)(*args)
