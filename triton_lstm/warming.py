"""``warm``: compiles the kernels that a model's layers will launch, on all cores, before the first call."""
import itertools
import warnings
from typing import cast

import torch

from . import op
from .functional import DTYPES, zoneout_rates
from .kernels.launch import step_of
from .kernels.offline import compile_apart
from .layer import LSTM
from .plan import Plan
from .tuned import FLAGS, PACKED, PADDED


def warm(model: torch.nn.Module, batch: int, dtype: torch.dtype | None = None, *, lengths: bool = False,
         packed: bool = False, seconds: float | None = None) -> list[Plan]:
    """Compile what the ``triton_lstm.LSTM`` layers inside ``model`` (or ``model`` itself) launch for ``batch`` rows.

    dtype     of the input, or the one of autocast; None: that of the weights
    lengths   whether calls will have lengths or resets, whose kernels are others
    packed    whether calls will have packed sequences, whose kernels are others too
    seconds   how long it may take; what is not compiled by then is compiled by the first call

    Kernels depend on the batch and the type. The number of steps decides only whether forward keeps the gates for
    backward, so the kernels of both ways are compiled, unless the layer never keeps them. They are compiled in
    processes of their own, on all cores, into Triton's cache on disk, where this process and later ones find them.
    Without it the first call compiles them one after the other. The kernel for one step without gradients, which has no
    plan, is compiled too. Returns the plans. Layers that torch's own LSTM computes are left out.

    Raises ValueError where there is no such layer, or one is not on a CUDA device. Warns of a plan that fails to
    compile.
    """
    layers = [module for module in model.modules() if isinstance(module, LSTM)]
    if not layers:
        raise ValueError(f"there is no triton_lstm.LSTM in {type(model).__name__}: convert makes one of each nn.LSTM")
    device_of = lambda layer: cast(torch.Tensor, layer.weight_hh_l0).device
    devices = {device_of(layer) for layer in layers}
    if any(device.type != "cuda" for device in devices):
        raise ValueError(f"warm compiles for CUDA devices, the layers are on {', '.join(map(str, devices))}")
    plans = []
    for device in devices:
        if op.no_kernels(device):
            continue
        of_device = [layer for layer in layers if device_of(layer) == device]
        major, minor = torch.cuda.get_device_capability(device)
        kinds = [FLAGS] * bool(lengths) + [PACKED] * bool(packed) or [PADDED]
        jobs = [job for kind in kinds for job in jobs_of(of_device, batch, dtype, device, kind)]
        jobs += steps_of(of_device, batch, dtype, device)
        plans += dict.fromkeys(plan for plan, _, _ in jobs if isinstance(plan, Plan))
        for (plan, _, _), error in compile_apart(jobs, 10 * major + minor, seconds):
            if error is not None:
                warnings.warn(f"triton_lstm could not compile {plan}: {error}", stacklevel=2)
    return plans


def jobs_of(layers, batch, dtype, device, sequences):
    """What ``compile_apart`` takes for such layers: (plan, dtype, options of ``compile_plan``), each once. sequences:
    ``tuned.Call.sequences``."""
    jobs = {}
    for layer in layers:
        D, H = 2 if layer.bidirectional else 1, layer.hidden_size
        of_layer = dtype or layer.weight_hh_l0.dtype
        zoned = any(zoneout_rates(layer.zoneout))
        plan, _ = (layer.plan, None) if layer.plan else op.on_device(
            batch, H, of_layer, D, device, None, zoned, sequences, measure=False) if (
            of_layer in DTYPES) else (None, None)
        if plan is None:
            continue
        # None: the number of steps decides, but not in calls with a plan of their own
        ways = [False] if layer.keep_gates is False or layer.plan and not layer.keep_gates else [False, True]
        for width, keep_gates in itertools.product(widths_of(layer), ways):
            # only a width that the time loop multiplies makes other kernels, and only a bias that a loop knows of
            multiplied = plan.multiplies_input(width)
            options = dict(flagged=sequences == FLAGS, packed=sequences == PACKED, zoneout="drawn" if zoned else None,
                           inputs=width if multiplied else 64, keep_gates=keep_gates,
                           bias=layer.bias or not (multiplied or plan.backward.adds_up_da))
            jobs.setdefault((plan, of_layer, *options.values()), (plan, of_layer, options))
    return list(jobs.values())


def steps_of(layers, batch, dtype, device):
    """The same for one step without gradients: (``Step``, dtype, options of ``compile_step``), each once."""
    jobs = {}
    for layer in layers:
        D, H, widths = 2 if layer.bidirectional else 1, layer.hidden_size, widths_of(layer)
        of_layer = dtype or layer.weight_hh_l0.dtype
        if of_layer not in DTYPES or layer.plan or layer.proj_size or any(zoneout_rates(layer.zoneout)):
            continue
        if precision := op.one_step_precision(batch, of_layer, device, max(widths), H, D):
            for width in widths:
                job = step_of(batch, width, H, D, precision), of_layer, dict(bias=layer.bias)
                jobs.setdefault((*job[:2], layer.bias), job)
    return list(jobs.values())


def widths_of(layer):
    """Features of x of its first layer, and of the others if there are any."""
    D = 2 if layer.bidirectional else 1
    return [layer.input_size] + [D * (layer.proj_size or layer.hidden_size)] * (layer.num_layers > 1)
