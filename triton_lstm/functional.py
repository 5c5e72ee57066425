"""``lstm``: one layer as a function."""
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import op
from .kernels.rows import step_flags
from .op import differentiable, lstm_op, transformed
from .plan import Plan, PlanError
from .plan.limits import none_on
from .plan.search import BACKWARD_ELEMENTS, KEEP_EVERY
from .projection import combine, product, project, with_state
from .reference import lstm_reference, packed_reference, zoneout_shares

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_told = set()


def runs_kernels(x, dtype):
    """Whether the kernels compute on the device of ``x`` in ``dtype``; torch's own LSTM does the rest. AMD GPUs, which
    torch calls CUDA too, and old GPUs have no kernels. The first call there warns of it. What is recorded for other
    places has none either, see ``recorded``."""
    if recorded():
        return False
    if not x.is_cuda:
        return dtype in DTYPES and x.device.type == "cpu" and op.interpreted()
    reason = none_on(x.device) if torch.compiler.is_compiling() else op.no_kernels(x.device)
    if reason is None:
        return dtype in DTYPES
    if not torch.compiler.is_compiling():
        tell_once(reason, "triton_lstm")
    return False


def recorded():
    """Whether calls are recorded to run where this package is not: by torch.jit.trace or torch.onnx.export."""
    return torch._C._get_tracing_state() is not None or (
        torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def tell_once(reason, who="triton_lstm.LSTM"):
    """Warn that torch's own LSTM computes, once for each reason."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{who} uses torch's own LSTM: {reason}", stacklevel=4)


def zoneout_rates(zoneout):
    """(rate_h, rate_c) of ``zoneout``, which is one rate for both or a pair. ValueError unless both are in [0, 1]."""
    rates = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(rates) != 2 or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"zoneout must be a probability or a pair of them, for h and c, got {zoneout}")
    return rates


def draw_seed(device):
    """The seed of the masks of one call, drawn from torch's generator of the device. It stays on the device, so a
    replay of a CUDA graph draws a new one."""
    return torch.randint(-2 ** 63, 2 ** 63 - 1, (1,), device=device)


def lstm(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None,
         hx: Sequence[Tensor] | None = None, *, weight_hr: Tensor | None = None, lengths: Tensor | None = None,
         reset: Tensor | None = None, batch_sizes: Tensor | None = None, zoneout: float | tuple[float, float] = 0.,
         training: bool = True, plan: Plan | None = None, keep_every: int | None = None,
         keep_gates: bool | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer over a padded or packed batch, in one direction or both.

    x            (T, B, I), any strides; with ``batch_sizes`` (N, I): the rows of time 0, then of time 1, and so on
    weight_ih    W, (D, 4H, I) for D = 1 or 2 directions, or (4H, I) for one; gates in torch's order i, f, g, o
    weight_hh    R, (D, 4H, H) or (4H, H)
    bias         (D, 4H) or (4H,), the sum of nn.LSTM's two biases; no bias if None
    hx           (h0, c0), (D, B, H) each; zeros if None
    weight_hr    W_hr, (D, P, H) or (P, H): the projection of Sak et al. 2014 (``proj_size``). After each step
                 h = W_hr (o tanh(c)) has P units. Then weight_hh is (D, 4H, P), h0 and h_n are (D, B, P) and y is
                 (T, B, D P). No projection if None
    lengths      (B,) integers, best on x's device: how many steps of each row are valid, the first ones. y is zero
                 at the other steps, and x is not used there. h_n and c_n are the state after the last valid step, or
                 h0 and c0 if there is none. The reverse direction begins at the last valid step, so its final state is
                 that after step 0. Lengths below 0 count as 0, those above T as T. Every step is valid if None
    reset        (T, B) bool: before each step at which it is True, h and c are set to zero, and no gradient passes.
                 This cuts a row into independent pieces. The reverse direction runs over the same pieces. No resets if
                 None
    batch_sizes  (T,) integers on the CPU, each at most the one before, as in a ``PackedSequence``: how many rows of
                 the batch x has at each time. They are the first ones. y (N, D H) has the same rows. Nothing is padded.
                 Cannot be combined with lengths or reset
    zoneout      a rate for both h and c, or a pair (rate_h, rate_c): the probability that a unit of a row keeps its
                 earlier h, or its earlier c, at a step (Krueger et al. 2017). With masks m_h and m_c:
                 c_t = m_c c + (1 - m_c) (f c + i g) and h_t = m_h h + (1 - m_h) o tanh(f c + i g). As in the paper,
                 h_t uses the new f c + i g even for units whose c is kept. After a reset the earlier h and c are zero.
                 Each call draws one seed from torch's generator of the device. Backward computes the masks again from
                 the seed
    training     whether zoneout draws masks. If False, m_h and m_c are the rates, which is their expectation
    plan         a ``Plan`` to use instead of the automatic one
    keep_every   forward keeps c before every ``keep_every``-th step, and backward recomputes that many steps at a time.
                 A small number saves memory, a large one saves launches. None: up to 2048, as large as a workspace of
                 512 MiB allows (640 MiB in fp32)
    keep_gates   True: forward keeps the four gates and c of every step, and backward recomputes nothing. That is
                 faster and takes 12 bytes for each unit, row and step in 16-bit types, 20 in fp32. False: forward keeps
                 c as ``keep_every`` says. None: True for up to so many steps as backward would recompute at a time, and
                 False with ``plan`` or ``keep_every``, and under torch.func. By this default gates and workspace take
                 at most twice the workspace for recomputing

    Returns ``y, (h_n, c_n)`` as nn.LSTM: y (T, B, D H) or (N, D H), h_n and c_n (D, B, H). T = 0 gives an empty y and
    the initial state.

    All tensors have the same device and the same dtype, float16, bfloat16 or float32. c and sums are kept in fp32. fp32
    products follow ``torch.backends.cudnn.rnn.fp32_precision`` (or ``cudnn.allow_tf32``), as those of nn.LSTM do. On
    other devices and in float64 torch's own LSTM computes. There lengths, reset and zoneout run step by step in torch
    operators. Neither lengths nor reset makes the host wait for the GPU. The Gluon kernels have no zoneout: with it a
    plan for the plain Triton kernels is chosen.

    With weight_hr the kernels run on m = o tanh(c), with the product R W_hr (D, 4H, H) as recurrent weights. It is
    rounded once to the dtype. The plan is the one of H units without projection, even if R W_hr does not fit on the
    chip. Backward keeps m as well as y. If hx is given, x is copied, with D P more columns.

    Derivatives of any order exist, also by ``torch.func``'s grad, vjp and jacrev. Kernels compute the first
    derivatives. Higher ones are computed from the equations, step by step in torch operators, which is slow and keeps
    every activation. ``torch.func.vmap`` and ``is_grads_batched`` call the kernels once for each member. Under vmap
    zoneout in training needs randomness="same" or "different", as dropout does.

    Raises ValueError for shapes, dtypes, rates or a plan that do not fit together; PlanError (a ValueError) if no
    schedule fits the device; RuntimeError for tensors on several devices; TypeError for a mask, ``batch_sizes`` or a
    plan of another class; NotImplementedError in forward-mode differentiation (jvp).
    """
    return one_of(1, x, weight_ih, weight_hh, bias, hx, weight_hr, lengths, reset, batch_sizes, zoneout, training, plan,
                  keep_every, keep_gates)


def one_of(layers, x, weight_ih, weight_hh, bias, hx, weight_hr, lengths, reset, batch_sizes, zoneout, training, plan,
           keep_every, keep_gates):
    """``lstm``, for one of several ``layers``. Only all together may keep their gates by default."""
    if weight_ih.dim() == 2:
        weight_ih, weight_hh = weight_ih.unsqueeze(0), weight_hh.unsqueeze(0)
        bias, weight_hr = (None if t is None else t.unsqueeze(0) for t in (bias, weight_hr))
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        raise ValueError(f"x must have the shape {'(N, I)' if packed else '(T, B, I)'}, got {tuple(x.shape)}")
    D, P, I = weight_hh.shape[0], weight_hh.shape[-1], x.shape[-1]
    H = P if weight_hr is None else weight_hr.shape[-1]
    if packed:
        if lengths is not None or reset is not None:
            raise ValueError("lengths and reset are for padded input, batch_sizes for packed")
        if not isinstance(batch_sizes, torch.Tensor):
            raise TypeError(f"batch_sizes must be a tensor, got {type(batch_sizes).__name__}")
        if batch_sizes.dim() != 1:
            raise ValueError(f"batch_sizes must have the shape (T,), got {tuple(batch_sizes.shape)}")
        if batch_sizes.is_floating_point() or batch_sizes.is_complex():
            raise ValueError(f"batch_sizes must be integers, got {batch_sizes.dtype}")
        if batch_sizes.device.type != "cpu":        # the host would wait for it
            raise ValueError(f"batch_sizes must be on the CPU, got {batch_sizes.device}")
        T, B = len(batch_sizes), hx[0].shape[1] if hx is not None else int(batch_sizes[0])
    else:
        T, B = x.shape[:2]
    h0, c0 = hx if hx is not None else (x.new_zeros(D, B, P), x.new_zeros(D, B, H))
    check(x, (D, B, I, H, P), weight_ih, weight_hh, bias, h0, c0, weight_hr)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a triton_lstm.Plan, got {type(plan).__name__}")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every must be at least 1, got {keep_every}")
    if weight_hr is not None and P >= H:
        raise ValueError(f"a projection must have fewer units than the layer, got {P} of {H}")
    lengths, reset = checked(lengths, (B,), "lengths", x.device), checked(reset, (T, B), "reset", x.device)
    rates, seed = zoneout_rates(zoneout), None
    if any(rates) and weight_hr is not None:
        raise ValueError(f"zoneout={zoneout} with a projection is not implemented")
    if training and any(rates):
        seed = draw_seed(x.device)
    if not runs_kernels(x, x.dtype):
        return _torch_lstm(x, weight_ih, weight_hh, bias, h0, c0, lengths, reset, batch_sizes, weight_hr,
                           (seed, *rates))
    inputs = x, weight_ih, weight_hh, bias, h0, c0
    if not torch.compiler.is_compiling() and any(t is not None and forward_ad.unpack_dual(t).tangent is not None
                                                 for t in (*inputs, weight_hr)):
        # an operator without a formula for tangents would drop them where nothing requires grad
        raise NotImplementedError("triton_lstm has no forward AD (jvp): use torch.func.jacrev or vjp")
    if weight_hr is not None:
        if hx is not None:
            x, weight_ih = with_state(x, weight_ih, weight_hh, h0, lengths, reset, batch_sizes)
        # of one step h0 is all that R is multiplied by
        one = hx is not None and not torch.compiler.is_compiling() and T == 1
        combined = x.new_zeros(D, 4 * H, H) if one else combine(weight_hh, weight_hr)
        m, (m_n, c_n) = one_of(layers, x, weight_ih, combined, bias, (x.new_zeros(D, B, H), c0), None, lengths, reset,
                               batch_sizes, 0., training, plan, keep_every, keep_gates)
        h_n = product(m_n, weight_hr.mT)
        if hx is not None and lengths is not None:
            h_n = torch.where((lengths > 0)[:, None], h_n, h0)
        return project(m, weight_hr), (h_n if T else h0.clone(), c_n)
    flags = flags_of(T, B, D, lengths, reset, batch_sizes, x.device, op.plain(lengths, reset))
    # vmap hides whether what it wraps requires grad
    save = torch.is_grad_enabled() and (transformed() or any(t is not None and t.requires_grad for t in inputs))
    steps, gates_steps = keep_every if plan is None else plan.keep_every, T if keep_gates else 0
    if steps is None and torch.compiler.is_compiling():
        steps = _symbolic_keep_every(B, H, D)
        if keep_gates is None and save and not transformed():
            gates_steps = steps // layers       # T may be symbolic, so the operator compares it
    elif steps is None:
        automatic, reason = op.on_device(B, H, x.dtype, D, x.device, zoneout=any(rates),
                                         sequences=op.sequences_of(flags is not None, packed))
        if automatic is None:
            raise PlanError(reason)
        steps = automatic.keep_every
        if keep_gates is None:
            gates_steps = T if save and not transformed() and automatic.keeps_gates(T, layers) else 0
    y, h_n, c_n, *_ = differentiable(lstm_op, *inputs, flags, batch_sizes, plan.encode() if plan else "", steps, save,
                                     gates_steps, seed, *map(float, rates))
    return y, (h_n, c_n)


def check(x, sizes, weight_ih, weight_hh, bias, h0, c0, weight_hr=None):
    """Raise what ``lstm`` documents unless all tensors have the shapes of ``sizes`` (D, B, I, H, P) and the dtype and
    device of x."""
    D, B, I, H, P = sizes
    tensors = dict(weight_ih=(weight_ih, (D, 4 * H, I)), weight_hh=(weight_hh, (D, 4 * H, P)), bias=(bias, (D, 4 * H)),
                   weight_hr=(weight_hr, (D, P, H)), h0=(h0, (D, B, P)), c0=(c0, (D, B, H)))
    if D not in (1, 2):
        raise ValueError(f"weights must be of 1 or 2 directions, got {D}")
    for name, (tensor, shape) in tensors.items():
        if tensor is None:          # the weights and states are there
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the input's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise RuntimeError(f"{name} must be on the input's device {x.device}, got {tensor.device}")


def _symbolic_keep_every(B, H, D):
    """``keep_every_for`` as an expression of symbolic sizes: a comparison would tie the graph to a range of batch
    sizes. Dynamo makes such expressions of max and min itself, and that of torch 2.10 takes no ``sym_max`` of plain
    integers."""
    larger, smaller = (max, min) if torch.compiler.is_dynamo_compiling() else (torch.sym_max, torch.sym_min)
    steps = BACKWARD_ELEMENTS // (H * D * larger(B, 1))
    return smaller(larger(steps, 16), KEEP_EVERY)


def flags_of(T, B, D, lengths, reset, batch_sizes, device, plain):
    """The step flags of a call with these arguments, or None if it needs none. plain: what ``op.plain`` says of lengths
    and reset."""
    if lengths is reset is batch_sizes is None:
        return None
    sizes = None if batch_sizes is None else batch_sizes.to(device, non_blocking=True)
    if plain:
        return op.sequence.step_flags(T, B, D, lengths, sizes, reset, device)
    if sizes is not None:
        lengths = (torch.arange(B, device=device) < sizes[:, None]).sum(0)
    return step_flags(T, B, D, lengths, reset, device)


def checked(mask, shape, name, device):
    """``lengths`` or ``reset``, moved to the device. Raises unless the shape and type are right."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(mask.shape)}")
    if name == "reset" and mask.dtype != torch.bool or mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"{name} must be {'bool' if name == 'reset' else 'integers'}, got {mask.dtype}")
    return mask if mask.device == device else mask.to(device, non_blocking=True)


def _torch_lstm(x, weight_ih, weight_hh, bias, h0, c0, lengths, reset, batch_sizes, weight_hr, zoneout):
    T, (D, B, H) = (x if batch_sizes is None else batch_sizes).shape[0], c0.shape
    keep = zoneout_shares(zoneout, T, B, D, H, x) if any(zoneout[1:]) else None
    if T and not (lengths is reset is keep is None):
        options = dict(weight_hr=weight_hr, keep=keep)
        if batch_sizes is not None:
            y, h_n, c_n = packed_reference(x, weight_ih, weight_hh, bias, h0, c0, batch_sizes, **options)
        else:
            y, h_n, c_n = lstm_reference(x, weight_ih, weight_hh, bias, h0, c0, lengths, reset, **options)
        return y, (h_n, c_n)
    if x.shape[0] == 0:
        return x.new_empty(0, x.shape[1], weight_hh.shape[0] * weight_hh.shape[2]), (h0.clone(), c0.clone())
    weights = []
    for d in range(weight_hh.shape[0]):
        weights += [weight_ih[d], weight_hh[d]]
        if bias is not None:
            weights += [bias[d], torch.zeros_like(bias[d])]
        if weight_hr is not None:
            weights += [weight_hr[d]]
    options = weights, bias is not None, 1, 0.0, False, weight_hh.shape[0] == 2
    if batch_sizes is None:
        y, h_n, c_n = torch._VF.lstm(x, (h0, c0), *options, False)
    else:
        y, h_n, c_n = torch._VF.lstm(x, batch_sizes, (h0, c0), *options)
    return y, (h_n, c_n)
