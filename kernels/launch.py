"""From a plan to a launch: which kernel runs a loop, with which constants, and how it is compiled and launched."""
import dataclasses
import functools
import logging
import math
import time
import typing
from collections.abc import Callable

import torch

from .cluster_backward import backward_cluster
from .cluster_forward import forward_cluster
from .language import CompiledKernel, driver, triton
from .portable_backward import backward_grid, backward_resident, coefficients, previous, states
from .portable_forward import forward_grid, forward_resident
from .precision import INTERPRET
from .rows import write_flags
from .split_backward import backward_split
from .split_forward import forward_split
from .step_forward import forward_step
from .wgmma_forward import forward_wgmma

log = logging.getLogger("triton_lstm")
KNOWN = 512             # how many combinations of sizes and plan each cache of launches remembers
LOGGED_S = 0.5          # a launch that takes longer has compiled its kernel

# Triton's interpreter runs a launch's programs one after the other, so one that waits for another waits for ever.
# Tests that interleave them set this.
interleaved = False


@dataclasses.dataclass(frozen=True)
class Loop:
    """A time loop: its kernel, and the constants that a plan gives it beside H and DIRECTIONS."""
    kernel: triton.runtime.KernelInterface
    constants: Callable


def _portable(plan):
    return dict(R_SLICES=plan.r_slices, BLOCK_B=plan.block_b, PRECISION=plan.precision, INTERPRET=INTERPRET)


def _portable_grid(plan):
    return dict(_portable(plan), BLOCK_H=plan.block_h, PADDED_PROGRAMS=plan.padded_programs, HELD=plan.held,
                BLOCK_K=plan.block_k)


def _cluster(plan):
    return dict(BLOCK_H=plan.block_h, BLOCK_B=plan.block_b, HELD=plan.register_bytes, PRECISION=plan.precision)


def _grid(plan):
    return dict(BLOCK_H=plan.block_h, PADDED_PROGRAMS=plan.padded_programs, PRECISION=plan.precision)


_grid_forward = Loop(forward_grid, _portable_grid)
_grid_backward = Loop(backward_grid, lambda plan: dict(_portable_grid(plan), PROGRAMS=plan.programs))
LOOPS = {
    ("portable resident", "forward"): Loop(forward_resident, _portable),
    ("portable resident", "backward"): Loop(backward_resident, _portable),
    ("resident", "forward"): Loop(forward_cluster, _cluster),
    ("resident", "backward"): Loop(backward_cluster, _cluster),
    ("cluster", "forward"): Loop(forward_cluster, _cluster),
    ("cluster", "backward"): Loop(backward_cluster, _cluster),
    ("grid", "forward"): _grid_forward,
    ("grid", "backward"): _grid_backward,
    ("streamed", "forward"): _grid_forward,
    ("streamed", "backward"): _grid_backward,
    ("split", "forward"): Loop(forward_split, lambda plan: dict(
        _grid(plan), R_SLICES=plan.r_slices, UNITS_PER_WARP=plan.held // plan.num_warps, HELD=plan.register_room)),
    ("split", "backward"): Loop(backward_split, lambda plan: dict(
        _grid(plan), TARGET_SLICES=plan.target_slices, PROGRAMS=plan.programs, HELD=plan.register_room)),
    ("wgmma", "forward"): Loop(forward_wgmma, lambda plan: dict(
        _grid(plan), R_SLICES=plan.r_slices, BLOCK_B=plan.block_b)),
}
COEFFICIENTS, PREVIOUS, STATES, FLAGS = coefficients, previous, states, write_flags
BEFORE_LOOPS = {"coefficients", "previous", "states", "write_flags"}        # run before a loop, by name: no R
STEP = forward_step
# That ``forward_step`` reads through L2, tile by tile: 0.15 ms at an assumed 3.5 TB/s, which the host takes for
# a call of the general way. With more rows and units, products of larger tiles are worth that.
STEP_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class Step:
    """How ``forward_step`` computes a layer, in the place of a plan. It needs none: no program waits for another, and
    nothing stays on the chip."""
    hidden_size: int
    directions: int
    inputs: int
    block_b: int
    block_k: int
    precision: str
    block_h = 16            # few units, so that many programs share the reading of the weights
    num_warps = 4
    kind = "step"
    programs = 1

    def grid(self, batch):
        """Programs along the tiles of rows, the tiles of units and the directions."""
        # triton.cdiv takes the host longer than an allocation
        return -(-batch // self.block_b), -(-self.hidden_size // self.block_h), self.directions

    @property
    def constants(self):
        return dict(INPUTS=self.inputs, BLOCK_B=self.block_b, BLOCK_H=self.block_h, BLOCK_K=self.block_k,
                    PRECISION=self.precision, INTERPRET=INTERPRET)


@dataclasses.dataclass(frozen=True)
class NoPlan:
    """In the place of a plan for a kernel that is the same for layers of all sizes."""
    directions: int
    hidden_size = 1
    num_warps = 4
    kind = "none"
    programs = 1


NO_PLAN = {D: NoPlan(D) for D in (1, 2)}


@functools.lru_cache
def step_of(batch, inputs, hidden_size, directions, precision):
    """The ``Step`` of a layer. Wider blocks spill registers; tiles of 64 rows would be products of another kind, by
    wgmma and tcgen05."""
    block_b = 16 if batch <= 16 else 32
    block_k = {"native": 2048 // block_b, "tf32": 64, "tf32x3": 1024 // block_b}[precision]
    return Step(hidden_size, directions, inputs, block_b, block_k, precision)


@functools.lru_cache
def step_pays(batch, inputs, hidden_size, directions, element):
    """Whether the programs of ``forward_step`` read at most ``STEP_BYTES``, of weights and rows that have ``element``
    bytes for each feature and unit."""
    step = step_of(batch, inputs, hidden_size, directions, "native")
    each = (step.block_b + 4 * step.block_h) * (inputs + hidden_size) * element
    return math.prod(step.grid(batch)) * each <= STEP_BYTES


def grid_of(plan):
    """The programs of a time loop."""
    return (plan.programs, plan.groups, plan.directions) if plan.exchanges else (plan.groups, plan.directions)


def options(kernel, plan, waits, constants):
    """Compiler and launch options of a kernel of ``plan``; programs that wait must all run at the same time.

    maxnreg: a multiprocessor runs one such program, which has all registers to itself. Without it the assembler tends
    to stop at 128 registers of a thread, for a second program, and then waits for each load before it issues the next.
    """
    num_warps = plan.num_warps
    if kernel is forward_cluster and constants["flags_ptr"] is None:       # step flags take the registers of more warps
        num_warps = plan.forward_warps
    chosen = dict(num_warps=num_warps, enable_fp_fusion=True, maxnreg=min(65536 // (32 * num_warps), 255))
    if plan.kind == "cluster" and kernel not in (coefficients, previous, states):
        chosen["num_ctas"] = plan.programs
    if waits:
        chosen["launch_cooperative_grid"] = True
    return chosen


class Found(typing.NamedTuple):
    """A compiled kernel, and (name, default) of each parameter that launches give by name."""
    kernel: triton.runtime.KernelInterface      # so that no other gets its id
    compiled: CompiledKernel
    parameters: list

    def named(self, plan, constants):
        """The arguments that launches give by name, in the order of the kernel's parameters."""
        given = dict(constants, H=plan.hidden_size, DIRECTIONS=plan.directions)
        return [given.get(name, default) for name, default in self.parameters]

    def arguments(self, plan, grid, stream, args, constants):
        """All arguments of the launcher of the compiled kernel, ``compiled.run``."""
        return (*(*grid, 1)[:3], stream, self.compiled.function, self.compiled.packed_metadata, None, None, None, *args,
                *self.named(plan, constants))


def hooked():
    """Whether there are hooks, such as those of Triton's profiler, which only Triton's own launch calls."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


_compiled = {}          # ``Found`` by everything that Triton compiles a kernel for


def _specialised(args):
    """What Triton may compile a kernel for of run-time arguments: tensors, integers and None. Finer than Triton's own
    rule for integers that it does not specialise on, which costs another entry and no other kernel."""
    found = []
    for arg in args:
        if arg is None:
            found.append(None)
        elif type(arg) is int:
            found.append((arg % 16 == 0, arg == 1, -2 ** 31 <= arg < 2 ** 31))
        else:
            found += arg.dtype, arg.data_ptr() % 16 == 0
    return found


class Launch:
    """A kernel with all its arguments except the tensors. The sizes and the plan of a call determine these arguments,
    so calls of the same sizes share one ``Launch``.

    A ``Launch`` remembers its compiled kernels by the types and the alignment of the tensors. To find one this way
    takes the host less time than the key of ``launch_kernel``, which has every argument.

    kernel, plan, grid, waits    as for ``launch_kernel``
    numbers      what follows the tensors among the kernel's arguments
    names        of arguments that are tensors or None
    constants    all other arguments with a name
    """

    def __init__(self, kernel, plan, grid, *numbers, waits, names=("flags_ptr", "offsets_ptr"), **constants):
        self._of = kernel, plan, grid
        self._numbers, self._waits, self._names, self._constants = numbers, waits, names, constants
        self._remembered = {}

    def __call__(self, launcher, tensors, named, **more):
        """Launch with ``tensors``, and those ``named`` as the names say.

        launcher    stands in for ``launch_kernel`` unless None
        more        arguments that only some calls of these sizes have
        """
        if self._remembered and not (launcher or more):
            device = driver.active.get_current_device()
            remembered = self._remembered.get(self._key(device, tensors, named))
            if remembered is not None and not hooked():
                run, grid, function, metadata, rest, places = remembered
                rest = rest.copy()
                for place, tensor in zip(places, named):
                    rest[place] = tensor
                run(*grid, driver.active.get_current_stream(device), function, metadata, None, None, None, *tensors,
                    *rest)
                return
        found = (launcher or launch_kernel)(*self._of, *tensors, *self._numbers, waits=self._waits,
                                            **dict(zip(self._names, named)), **self._constants, **more)
        if isinstance(found, Found) and not (launcher or more):
            device, (_, plan, grid) = driver.active.get_current_device(), self._of
            if tensors[0].get_device() not in (device, -1):         # -1 is a CPU that stands for the GPU
                return
            places = {name: len(self._numbers) + n for n, (name, _) in enumerate(found.parameters)}
            self._remembered[self._key(device, tensors, named)] = (
                found.compiled.run, (*grid, 1)[:3], found.compiled.function, found.compiled.packed_metadata,
                [*self._numbers, *found.named(plan, self._constants)], [places[name] for name in self._names])

    @staticmethod
    def _key(device, tensors, named):
        return device, tensors[0].get_device(), *[
            t if t is None else t.dtype if t.data_ptr() % 16 == 0 else (t.dtype,) for t in (*tensors, *named)]


def launch_kernel(kernel, plan, grid, *args, waits, **constants):
    """Run ``kernel`` over ``grid``; ``waits`` tells whether its programs wait for each other. Returns what was
    ``Found``, or None in the interpreter."""
    if INTERPRET:
        if waits and plan.programs > 1 and not interleaved:
            raise RuntimeError(f"the interpreter would wait for ever: {plan.programs} programs exchange h")
        kernel[grid](*args, H=plan.hidden_size, DIRECTIONS=plan.directions, **constants)
    elif args[0].is_cuda and args[0].device.index != torch.cuda.current_device():
        with torch.cuda.device_of(args[0]):
            return _launch(kernel, plan, grid, args, waits, constants)
    else:
        return _launch(kernel, plan, grid, args, waits, constants)


def _launch(kernel, plan, grid, args, waits, constants):
    """The first launch of a kind is Triton's, which finds or makes the compiled kernel. Later ones call the launcher of
    that kernel with the same arguments, which takes a tenth of the time."""
    device = driver.active.get_current_device()
    key = (id(kernel), device, waits, plan.hidden_size, plan.directions, plan.num_warps, plan.programs,
           *_specialised(args), *constants,
           *[(value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor) else value
             for value in constants.values()])
    found = _compiled.get(key)
    if found is None or hooked():
        began = time.monotonic()
        compiled = kernel[grid](*args, H=plan.hidden_size, DIRECTIONS=plan.directions, **constants,
                                **options(kernel, plan, waits, constants))
        if (seconds := time.monotonic() - began) > LOGGED_S:
            log.info("compiled %s for H=%d in %.1f s; Triton keeps it in its cache for later processes",
                     kernel.__name__, plan.hidden_size, seconds)
        if isinstance(compiled, CompiledKernel):
            found = _compiled[key] = Found(kernel, compiled, [(p.name, p.default) for p in kernel.params[len(args):]])
        return found
    found.compiled.run(*found.arguments(plan, grid, driver.active.get_current_stream(device), args, constants))
    return found
