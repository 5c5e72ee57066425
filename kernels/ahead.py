"""Compiles kernels for an architecture with no GPU at hand: what the tests and the benchmark read machine code from."""
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from . import launch

_POINTEES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
_compiled = {}


def compile_launch(kernel, plan, args, waits, constants, arch):
    """What a launch of ``kernel`` with these arguments would compile, and the arguments that remain at run time.

    arch: 80, 90, 100. Arguments are specialised as a launch does: pointers and integers on divisibility by 16,
    integers on 1 and on their width.
    """
    constants = {**constants, "H": plan.hidden_size, "DIRECTIONS": plan.directions}
    values = {**dict(zip(kernel.arg_names, args)), **constants}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    signature, fixed, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _POINTEES[value.dtype]
            divisible = value.is_meta or value.data_ptr() % 16 == 0
        elif name in constants or (value == 1 and name not in free):
            signature[name], fixed[name], divisible = "constexpr", value, False
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and name not in free
        if divisible:
            attrs[(i,)] = [["tt.divisibility", 16]]
    options = launch.options(kernel, plan, waits)
    key = kernel.__name__, arch, repr((signature, fixed, attrs, options))
    if key not in _compiled:
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        _compiled[key] = triton.compile(source(kernel, signature, fixed, attrs),
                                        target=GPUTarget("cuda", arch, 32), options=options)
    return _compiled[key], [values[name] for name in kernel.arg_names if signature[name] != "constexpr"]


def compile_plan(plan, dtype, arch=90):
    """The kernels that a layer of ``plan`` launches in ``dtype``, compiled: {name: what triton.compile returns}."""
    found = {}

    def collect(kernel, plan, grid, *args, waits, **constants):
        found[kernel.__name__] = compile_launch(kernel, plan, args, waits, constants, arch)[0]

    D, B, H = plan.directions, plan.batch, plan.hidden_size
    tensor = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    x, w, r, b, state = tensor(2, B, 16), tensor(D, 4 * H, 16), tensor(D, 4 * H, H), tensor(D, 4 * H), tensor(D, B, H)
    y, h_n, c_n, kept = launch.forward(x, w, r, b, state, state, plan, True, run=collect)
    launch.backward(y, h_n, c_n, x, w, r, b, state, state, y, kept, plan, [True] * 6, run=collect)
    return found
