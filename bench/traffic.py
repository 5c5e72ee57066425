"""What a call of a layer launches, and how many bytes it moves through device memory: counted, not measured.

The layer runs on meta tensors as on an H100, and every operator of torch and every kernel is counted in place of being
launched. Bytes are those that operators and kernels read and write of inputs, outputs and activations. They leave out
what stays on the chip or in its caches: R, and what programs exchange.
"""
import collections
import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton_lstm
from triton_lstm import op
from triton_lstm.kernels import launch

from .correctness import dtype_of
from .host import stand_ins

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ONLY_WRITTEN = {"zero_", "fill_", "copy_", "new_zeros"}     # which do not read their first argument
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"}


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name in ALLOCATES or function.is_view or name in ("detach", "alias", "_unsafe_view", "lift_fresh"):
            return found
        read = args[1:] if name in ONLY_WRITTEN else args
        tensors = [t for t in tree_leaves((read, found)) if isinstance(t, torch.Tensor)]
        # tensors on the CPU are made there, and copied with the call
        if any(t.device.type == "meta" for t in tensors):
            self.launches["products" if name in PRODUCTS else "operators"] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return found

    def launch(self, kernel, plan, grid, *args, waits, **constants):
        given = {**dict(zip(kernel.arg_names, args)), **constants}
        self.launches["kernels"] += 1
        if kernel is launch.FLAGS:
            self.bytes += sum(given[name].numel() * given[name].element_size()
                              for name in ("flags_ptr", "lengths_ptr", "sizes_ptr", "reset_ptr")
                              if given[name] is not None)
            return
        units = plan.directions * given["S"] * given["B"] * plan.hidden_size
        if kernel.__name__.startswith("forward"):
            element, keeps = given["y_ptr"].element_size(), given.get("KEEP_GATES", False)
            # pre-activations, or x in their place; y; the gates and c that are kept
            inputs = 4 * units if "INPUTS" not in given else units // plan.hidden_size * given["INPUTS"]
            moved = (inputs + units + (4 * units if keeps else 0)) * element + (4 * units if keeps else 0)
        elif kernel.__name__ == "coefficients":
            c_every_step = given["keep_every"] == 1
            moved = units * (4 * given["a_ptr"].element_size() + 24 + (4 if c_every_step else 0))
        elif kernel.__name__ == "previous":
            moved = 2 * units * given["y_ptr"].element_size()
        elif kernel.__name__ == "states":
            moved = units * (4 * given["a_ptr"].element_size() + 4)
        else:
            element = given["da_ptr"].element_size()
            read = 24 if given.get("kept_ptr") is None else 4 * element + 4
            moved = units * (read + (4 + (given["dy_ptr"] is not None)) * element)
        self.bytes += moved


def count(workload, keep_gates=None):
    """{"forward": (launches, bytes), "backward": ...} of a call of ``workload``, a ``bench.workloads.Workload``;
    launches: {"kernels", "products", "operators": how many}. keep_gates: see ``triton_lstm.LSTM``."""
    w, dtype = workload, dtype_of(workload.dtype)
    found = {}
    with contextlib.ExitStack() as stack:
        # plain: as without a dispatch mode
        for owner, name, value in (*stand_ins(), (op, "plain", lambda *tensors: True)):
            stack.enter_context(mock.patch.object(owner, name, value))
        with torch.device("meta"):
            layer = triton_lstm.LSTM(w.input_size, w.hidden_size, w.layers, bidirectional=w.directions == 2,
                                     dropout=w.dropout, dtype=dtype)
            layer.keep_gates = keep_gates
            x = torch.empty(w.steps, w.batch, w.input_size, dtype=dtype, requires_grad=w.mode == "train")
            masks = {}
            if w.sequences == "resets":
                masks = dict(reset=torch.empty(w.steps, w.batch, dtype=torch.bool))
            elif w.sequences == "ragged":
                masks = dict(lengths=torch.empty(w.batch, dtype=torch.int64))
        dy = torch.empty(w.steps, w.batch, w.directions * w.hidden_size, dtype=dtype, device="meta")
        run = None
        for part in ("forward", "backward")[:1 + (w.mode == "train")]:
            counted = _Count()
            with mock.patch.object(launch, "launch_kernel", counted.launch), counted, torch.set_grad_enabled(
                    w.mode == "train"):
                if part == "forward":
                    run, _ = layer(x, **masks)
                else:
                    run.backward(dy)
            found[part] = dict(counted.launches), counted.bytes
    return found


def show(workloads):
    """Print launches and megabytes of each of ``workloads``, forward and backward together, as Markdown: with the gates
    recomputed, with the gates kept, and by default."""
    print("| workload | launches, recomputing | keeping | by default | MB, recomputing | keeping | by default |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for w in workloads:
        ways = [count(w, keep_gates).values() for keep_gates in (False, True, None)]
        cells = [f"{sum(sum(launches.values()) for launches, _ in way)}" for way in ways]
        cells += [f"{sum(moved for _, moved in way) / 1e6:.0f}" for way in ways]
        print(f"| {w.name} | {' | '.join(cells)} |", flush=True)
