"""A kernel that only exchanges h between the CTAs of a cluster. ``floors`` times it."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton_lstm.kernels.cluster_exchange import allocate_mbarriers, send_to_all
from triton_lstm.kernels.layouts import shared_layout, unit_layout


@gluon.jit(do_not_specialize=["steps"])
def cluster_exchanges(h_ptr, steps, BLOCK_H: gl.constexpr, BLOCK_B: gl.constexpr):
    """``steps`` exchanges in each cluster, each like the one in a step of ``forward_cluster``. A CTA sends what it
    received, so in the end h (clusters, BLOCK_B, units) is unchanged."""
    dtype: gl.constexpr = h_ptr.dtype.element_ty
    CTAS: gl.constexpr = gl.num_ctas()
    UNITS: gl.constexpr = CTAS * BLOCK_H
    UNIT: gl.constexpr = unit_layout(BLOCK_B, BLOCK_H, gl.num_warps(), CTAS)
    WIDTH: gl.constexpr = min(1024 // dtype.primitive_bitwidth, UNITS)
    ROWS: gl.constexpr = shared_layout(dtype.primitive_bitwidth, WIDTH, [1, 0], None, CTAS)
    row = gl.arange(0, BLOCK_B, gl.SliceLayout(1, UNIT))[:, None]
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, UNIT))[None, :]
    h_ptr += (gl.program_id(0) * BLOCK_B + row) * UNITS + unit
    received = gl.allocate_shared_memory(dtype, [2, CTAS, BLOCK_B, UNITS],
                                         shared_layout(dtype.primitive_bitwidth, WIDTH, [2, 1, 0], 0, CTAS))
    bars = allocate_mbarriers()
    h = gl.load(h_ptr)
    send_to_all(h, received.index(0), bars.index(0), BLOCK_H)
    s = 0
    while s < steps:
        mbarrier.wait(bars.index(s % 2), s // 2 % 2)
        h = received.index(s % 2).reinterpret(dtype, [BLOCK_B, UNITS], ROWS).load(UNIT)
        s += 1
        send_to_all(h, received.index(s % 2), bars.index(s % 2), BLOCK_H)
    mbarrier.wait(bars.index(steps % 2), steps // 2 % 2)        # no CTA exits while others store into its shared memory
    gl.store(h_ptr, h)
