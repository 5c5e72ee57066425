"""The time that a step takes at least: computed from the plan, and from microbenchmarks of this GPU.

The rates are those of a Hopper multiprocessor, per cycle: 2048 multiply-adds in 16-bit types with wgmma, and 1280 with
mma.sync (63 % of them, as arXiv 2402.13499 measures); half as many in TF32; 16 special functions; 64 bytes from the
second-level cache.
"""
import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton_lstm.kernels.exchange import receive, send_h
from triton_lstm.kernels.precision import INTERPRET, products_in
from triton_lstm.kernels.waiting import EXCHANGES

from triton_lstm import make_plan
from triton_lstm.kernels import exchange, waiting
from triton_lstm.plan import H200

from .cluster_exchange import cluster_exchanges
from .correctness import dtype_of

MULTIPLY_ADDS = {"native": 1280, "tf32": 640, "tf32x3": 640 / 3}
WGMMA_MULTIPLY_ADDS = {"native": 2048, "tf32": 1024}
SPECIAL_FUNCTIONS, L2_BYTES = 16, 64
LAUNCH = dict(num_warps=8, launch_cooperative_grid=True, enable_fp_fusion=True)
# Special functions of a cell: each of its three sigmoids and two tanh takes an exponential and a reciprocal. The Gluon
# kernels in 16-bit types take one tanh.approx for each.
EXACT_CELL, FAST_CELL = 10, 5
PORTABLE = dataclasses.replace(H200, cluster=0)         # gives plans of portable kernels, to time exchanges through L2


@triton.jit(do_not_specialize=["steps", "limit"])
def exchanges(sent_ptr, steps, R_SLICES: tl.constexpr, PADDED_PROGRAMS: tl.constexpr, BLOCK_H: tl.constexpr,
              BLOCK_B: tl.constexpr, INTERPRET: tl.constexpr, stuck_ptr=None, limit=None):
    """``steps`` exchanges of h in each group of programs, each like the one in a step of ``forward_grid``."""
    p, group = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = sent_ptr.dtype.element_ty
    UNITS: tl.constexpr = PADDED_PROGRAMS * BLOCK_H
    own = tl.arange(0, BLOCK_B)[:, None] * UNITS + p * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    s = 0
    while s < steps:
        tile = sent_ptr + (s * tl.num_programs(1) + group).to(tl.int64) * (BLOCK_B * UNITS)
        receive(tile, (stuck_ptr, limit, 0, s, 0), R_SLICES, UNITS, BLOCK_B, EXCHANGES)
        s += 1
        send_h(tile + tl.num_programs(1) * (BLOCK_B * UNITS) + own, tl.full((BLOCK_B, BLOCK_H), 1, dtype), INTERPRET)


class Floors:
    """Microbenchmarks. Each is measured once in a run for each size, and remembered."""

    def __init__(self, gpu):
        self._gpu = gpu
        for name in ("exchange_us", "launch_us", "gemm_tflops"):
            setattr(self, name, functools.cache(getattr(self, name)))

    def _best(self, call, repeat=5):
        call()
        return min(self._gpu.sample(call) for _ in range(repeat))

    def exchange_us(self, plan, dtype, steps=500):
        """Microseconds of an exchange of h in all groups of programs of ``plan`` that run at once. 0 where a program
        has all of R.

        h of one batch tile is exchanged; in wgmma plans 16 rows of it, because each warp waits for 16 rows by itself.
        """
        if plan.programs == 1:
            return 0.
        groups, rows = plan.groups * plan.directions, 16 if plan.kind == "wgmma" else plan.block_b
        if plan.kind == "cluster":
            groups = min(groups, self._gpu.multiprocessors // plan.programs)
            h = torch.zeros(groups, rows, plan.programs * plan.block_h, dtype=dtype_of(dtype), device=self._gpu.device)

            def call(n):
                cluster_exchanges[(groups,)](h, n, plan.block_h, rows, num_warps=plan.num_warps,
                                             num_ctas=plan.programs, enable_fp_fusion=True)
        else:
            sent = torch.empty(steps + 1, groups, rows, plan.padded_programs * plan.block_h, dtype=dtype_of(dtype),
                               device=self._gpu.device)

            limit = waiting.limit()
            limited = {} if limit is None else dict(stuck_ptr=waiting.records(sent.device), limit=limit)

            def call(n):
                exchange.fill(sent, plan)
                exchanges[(plan.programs, groups)](sent, n, plan.looks, plan.padded_programs, plan.block_h, rows,
                                                   INTERPRET, **limited, **LAUNCH)
        # The difference leaves out the launch, and filling ``sent``, which takes the same time for any n.
        few, many = (self._best(functools.partial(call, n)) for n in (steps // 10, steps))
        return 1000 * (many - few) / (steps - steps // 10)

    def launch_us(self):
        """Microseconds of one launch, when many follow each other."""
        plan = make_plan(16, 32, torch.float16, schedule="grid", limits=PORTABLE)
        sent = torch.zeros(1, 1, plan.block_b, plan.padded_programs * plan.block_h, dtype=torch.float16,
                           device=self._gpu.device)
        constants = plan.r_slices, plan.padded_programs, plan.block_h, plan.block_b, INTERPRET
        return 10 * self._best(lambda: [exchanges[(1, 1)](sent, 0, *constants, **LAUNCH) for _ in range(100)])

    def gemm_tflops(self, dtype):
        """TFLOP/s of an 8192^3 product; for fp32 in TF32, which torch by default allows an LSTM."""
        a, b = (torch.randn(8192, 8192, device=self._gpu.device, dtype=dtype_of(dtype)) for _ in range(2))
        with products_in("tf32"):
            return 2 * 8192 ** 3 / self._best(lambda: a @ b) / 1e9

    def step_us(self, plan, case, sm_mhz):
        """(``step_floor`` or None where the clock is unknown, measured microseconds of the forward loop's exchange)."""
        exchanged = self.exchange_us(plan, case.dtype)
        if not sm_mhz:
            return None, exchanged
        both = exchanged, self.exchange_us(plan.backward, case.dtype) if case.mode == "train" else 0.
        return step_floor(plan, case, both, sm_mhz, self.gemm_tflops(case.dtype), self._gpu.multiprocessors), exchanged


def step_floor(plan, case, exchange_us, sm_mhz, gemm_tflops, multiprocessors):
    """Microseconds that a step of ``case`` takes at least under ``plan``: all layers, and in training forward and
    backward.

    It is the sum of
    - the time loop: its tensor work, its special functions or its reads of R, whichever takes longest,
    - one exchange in the forward and one in the backward loop, whose times are ``exchange_us``,
    - in training, the backward loop, which computes products of the same size,
    - the products outside of the loops, at ``gemm_tflops``. Forward has x W^T. Backward has x W^T and h R^T, which
      recompute the gates, and the products for dx, dW and dR.
    """
    training = case.mode == "train"
    cell = FAST_CELL if plan.gluon and plan.precision == "native" else EXACT_CELL
    loop = _waves(plan, multiprocessors) * (_loop_cycles(plan, cell) / sm_mhz + exchange_us[0])
    if training:
        loop += _waves(plan.backward, multiprocessors) * (_loop_cycles(plan.backward, 0) / sm_mhz + exchange_us[1])
    widths = [case.input_size] + [case.directions * case.hidden_size] * (case.layers - 1)
    columns = sum(4 * width + 2 * case.hidden_size if training else width for width in widths)
    gemm = 2 * case.batch * 4 * case.hidden_size * columns * case.directions / gemm_tflops / 1e6
    return case.layers * loop + gemm


def _waves(plan, multiprocessors):
    """How many waves the programs run in, one after the other. Programs that wait for each other run all at once."""
    if plan.exchanges:
        return 1
    return -(-plan.groups * plan.directions // max(multiprocessors // plan.programs, 1))


def _loop_cycles(plan, special_functions):
    """Cycles that a step of a time loop takes at least, if each cell takes ``special_functions`` special functions."""
    units = plan.hidden_size if plan.schedule == "resident" else plan.block_h
    rows = plan.block_b * plan.tiles
    rate = (WGMMA_MULTIPLY_ADDS if plan.kind == "wgmma" else MULTIPLY_ADDS)[plan.precision]
    return max(rows * 4 * units * plan.hidden_size / rate, plan.tiles * plan.streamed_bytes / L2_BYTES,
               rows * units * special_functions / SPECIAL_FUNCTIONS)
