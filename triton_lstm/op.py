"""The custom operator ``triton_lstm::lstm``, its fake implementation and its autograd formula.

torch.compile and torch.export see one opaque operator. Tensors only go in and out; the plan travels as a string, empty
for the automatic one, which is then chosen when the shapes are known.
"""
import functools

import torch

from .kernels import launch
from .plan import Limits, Plan, make_plan


@functools.lru_cache
def limits_of(device):
    """The limits of a CUDA device; None stands for the interpreter, which has none."""
    return None if launch.INTERPRET else Limits.of(device)


def tf32_allowed():
    """Whether torch lets nn.LSTM multiply fp32 in TF32 on CUDA (its default). The interpreter stands for a CPU: no."""
    if launch.INTERPRET:
        return False
    cudnn = torch.backends.cudnn
    return cudnn.rnn.fp32_precision == "tf32" if hasattr(cudnn, "rnn") else cudnn.allow_tf32


@functools.lru_cache
def _automatic(batch, hidden_size, dtype, directions, limits, tf32, keep_every):
    return make_plan(batch, hidden_size, dtype, directions, limits=limits, tf32=tf32, keep_every=keep_every)


def automatic_plan(batch, hidden_size, dtype, directions, device, keep_every=None):
    """The plan of a call that names none."""
    return _automatic(batch, hidden_size, dtype, directions, limits_of(device), tf32_allowed(), keep_every)


def plan_for(x, r, text, keep_every):
    """The plan that runs x (T, B, I) with r (D, 4H, H): the decoded ``text``, or the automatic one."""
    directions, batch, hidden_size = r.shape[0], x.shape[1], r.shape[2]
    if not text:
        return automatic_plan(batch, hidden_size, x.dtype, directions, x.device, keep_every)
    plan = Plan.decode(text)
    if (plan.batch, plan.hidden_size, plan.directions) != (batch, hidden_size, directions):
        raise ValueError(f"the plan is for batch {plan.batch}, hidden_size {plan.hidden_size}, {plan.directions} "
                         f"direction(s), the call has {batch}, {hidden_size}, {directions}")
    if (plan.precision == "native") != (x.dtype != torch.float32):
        raise ValueError(f"the plan computes in {plan.precision}, the input is {x.dtype}")
    plan.check(limits_of(x.device))
    return plan


@torch.library.custom_op("triton_lstm::lstm", mutates_args=())
def lstm_op(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, h0: torch.Tensor,
            c0: torch.Tensor, marks: torch.Tensor | None, plan: str, keep_every: int, save: bool
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(x.device.type, enabled=False):      # the types are chosen already
        return launch.forward(x, w, r, b, h0, c0, marks, plan_for(x, r, plan, keep_every), save)


@lstm_op.register_fake
def _(x, w, r, b, h0, c0, marks, plan, keep_every, save):
    T, B, _ = x.shape
    D, _, H = r.shape
    kept = torch.sym_max(T - 1, 0) // keep_every if save else 0
    return (x.new_empty(T, B, D * H), x.new_empty(D, B, H), x.new_empty(D, B, H),
            x.new_empty(kept, D, B, H, dtype=torch.float32))


@torch.library.custom_op("triton_lstm::lstm_backward", mutates_args=())
def lstm_backward_op(dy: torch.Tensor | None, dh_n: torch.Tensor | None, dc_n: torch.Tensor | None, x: torch.Tensor,
                     w: torch.Tensor, r: torch.Tensor, b: torch.Tensor | None, h0: torch.Tensor, c0: torch.Tensor,
                     marks: torch.Tensor | None, y: torch.Tensor, kept: torch.Tensor, plan: str, keep_every: int,
                     needs: list[bool]
                     ) -> list[torch.Tensor]:
    plan = plan_for(x, r, plan, keep_every)
    with torch.autocast(x.device.type, enabled=False):
        gradients = launch.backward(dy, dh_n, dc_n, x, w, r, b, h0, c0, marks, y, kept, plan, needs)
    return [x.new_empty(0) if g is None else g for g in gradients]


@lstm_backward_op.register_fake
def _(dy, dh_n, dc_n, x, w, r, b, h0, c0, marks, y, kept, plan, keep_every, needs):
    shapes = [x.shape, w.shape, r.shape, w.shape[:2], h0.shape, c0.shape]
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs)]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.plan, ctx.keep_every, _ = inputs
    y, _, _, kept = output
    ctx.save_for_backward(*tensors, y, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh_n, dc_n, _):
    needs = list(ctx.needs_input_grad[:6])
    if dy is None and dh_n is None and dc_n is None:
        return (None,) * 10
    gradients = lstm_backward_op(dy, dh_n, dc_n, *ctx.saved_tensors, ctx.plan, ctx.keep_every, needs)
    return (*(g if need else None for g, need in zip(gradients, needs)), None, None, None, None)


lstm_op.register_autograd(_backward, setup_context=_setup_context)
