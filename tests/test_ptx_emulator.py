"""Tests ptx_emulator itself: it runs Triton and Gluon kernels, compiled without a GPU, and results are compared with
references.

The kernels are small and do not belong to the package. If a barrier, fence or wait is removed from their PTX, the
emulator must notice it. Single instructions must give the bits that plain Python computes.
"""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ptx_emulator import Deadlock, EmulatorError, Misaligned, OutOfBounds, SharedRace, Trap, Unsupported, launch, run

# names that Triton 3.9 changed
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier

VERSION = tuple(int(x) for x in triton.__version__.split(".")[:2])
needs_cluster = pytest.mark.skipif(VERSION < (3, 9), reason="convert_layout across CTAs needs Triton 3.9")


def build(fn, sig, consts, arch=90, gl_src=False, **opts):
    full = {**sig, **{k: "constexpr" for k in consts}}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(sig.values()) if t.startswith("*")}
    if gl_src:
        consts = {(list(fn.arg_names).index(k),): v for k, v in consts.items()}
        src = GluonASTSource(fn=fn, signature=full, constexprs=consts, attrs=attrs)
    else:
        src = ASTSource(fn=fn, signature=full, constexprs=consts, attrs=attrs)
    # fusion is set explicitly, because Triton warns if the default is used
    return triton.compile(src, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **opts})


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=gen(seed + sum(shape))) * scale).to(dtype)


def close(got, want, tol):
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all(), "not finite: uninitialised shared memory was read?"
    err = ((got - want).abs() / (1 + want.abs())).max().item()
    assert err < tol, f"error {err}"


# ------------------------------------------------------------------------------------------------ kernels
@triton.jit
def add_kernel(x, y, z, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(z + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)
    else:
        tl.store(z + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n))


@triton.jit
def softmax_kernel(x, y, n, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    p = tl.program_id(0)
    v = tl.load(x + p * n + r, mask=r < n, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + p * n + r, v / tl.sum(v, 0), mask=r < n)


@triton.jit
def matmul_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    N = tl.num_programs(1) * BN
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    ap = a + rm[:, None] * K + rk[None, :]
    bp = b + rk[:, None] * N + rn[None, :]
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(ap), tl.load(bp), acc)
        ap += BK
        bp += BK * N
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


@triton.jit
def matmul_types_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUT: tl.constexpr,
                        TRANSPOSED: tl.constexpr):
    rm = tl.arange(0, BM)
    rn = tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), OUT)
    ap = a + rm[:, None] * K + rk[None, :]
    if TRANSPOSED:
        bp = b + rk[:, None] + rn[None, :] * K
    else:
        bp = b + rk[:, None] * BN + rn[None, :]
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(ap), tl.load(bp), acc, out_dtype=OUT)
        ap += BK
        if TRANSPOSED:
            bp += BK
        else:
            bp += BK * BN
    tl.store(c + rm[:, None] * BN + rn[None, :], acc)


@triton.jit
def math_kernel(x, k, f, j, n, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    v = tl.load(x + r)
    i = tl.load(k + r)
    tl.store(f + r, tl.exp(v) + tl.log(tl.abs(v) + 1) + tl.sin(v) + tl.cos(v) + tl.floor(v) + tl.sqrt(tl.abs(v))
             + tl.cumsum(v, 0) + tl.sort(v) + tl.erf(v) + tl.div_rn(v, tl.abs(v) + 1))
    tl.store(j + r, i // 7 + i % 5 * 3 + (i >> 2) + tl.sort(i) + tl.cumsum(i, 0) + tl.argmax(v, 0)
             + (v.to(tl.bfloat16).to(tl.float32) * 256).to(tl.int32) + (v.to(tl.float16) * 64).to(tl.int32))
    tl.atomic_add(j + n + (i & 7), 1)
    tl.atomic_max(j + n + 8 + i * 0, i)
    tl.atomic_add(f + n + (r & 3), v)
    tl.store(j + n + 16 + tl.arange(0, 8), tl.histogram(i & 7, 8))


@triton.jit
def sigm(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 * sigm(2 * x) - 1


@triton.jit
def lstm_kernel(gx, w, h0, c0, y, T, B, H: tl.constexpr, BM: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.arange(0, H)
    rk = tl.arange(0, H)
    wp = w + rk[:, None] * H + rn[None, :]
    wi = tl.load(wp)
    wf = tl.load(wp + H * H)
    wg = tl.load(wp + 2 * H * H)
    wo = tl.load(wp + 3 * H * H)
    off = rm[:, None] * H + rn[None, :]
    m = rm[:, None] < B
    h = tl.load(h0 + off, mask=m, other=0.)
    c = tl.load(c0 + off, mask=m, other=0.)
    gp = gx + rm[:, None] * (4 * H) + rn[None, :]
    yp = y + off
    t = 0
    while t < T:
        i = tl.load(gp, mask=m, other=0.).to(tl.float32)
        f = tl.load(gp + H, mask=m, other=0.).to(tl.float32)
        g = tl.load(gp + 2 * H, mask=m, other=0.).to(tl.float32)
        o = tl.load(gp + 3 * H, mask=m, other=0.).to(tl.float32)
        i = sigm(tl.dot(h, wi, i))
        f = sigm(tl.dot(h, wf, f))
        g = tanh(tl.dot(h, wg, g))
        o = sigm(tl.dot(h, wo, o))
        c = f * c + i * g
        h = (o * tanh(c)).to(h.dtype)
        tl.store(yp, h, mask=m)
        gp += B * 4 * H
        yp += B * H
        t += 1


@triton.jit
def grid_lstm_kernel(gx, w, h0, c0, y, bar, T, B, H: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr):
    """Program p has HB hidden units. One counter for each batch tile is the barrier of the H // HB programs."""
    NP: tl.constexpr = H // HB
    N: tl.constexpr = 4 * HB
    p = tl.program_id(0)
    bt = tl.program_id(1)
    rk = tl.arange(0, H)
    rn = tl.arange(0, N)
    W = tl.load(w + rk[:, None] * (4 * H) + p * N + rn[None, :])
    rm = bt * BM + tl.arange(0, BM)
    ru = p * HB + tl.arange(0, HB)
    m = rm[:, None] < B
    c = tl.load(c0 + rm[:, None] * H + ru[None, :], mask=m, other=0.)
    hp = h0 + rm[:, None] * H + rk[None, :]
    gp = gx + rm[:, None] * (4 * H) + p * N + rn[None, :]
    yp = y + rm[:, None] * H + ru[None, :]
    t = 0
    while t < T:
        h = tl.load(hp, mask=m, other=0., cache_modifier=".cg")
        acc = tl.dot(h, W, tl.load(gp, mask=m, other=0.).to(tl.float32))
        a, b = acc.reshape(BM, HB, 2, 2).split()
        i, g = a.split()
        f, o = b.split()
        c = sigm(f) * c + sigm(i) * tanh(g)
        tl.store(yp, (sigm(o) * tanh(c)).to(y.dtype.element_ty), mask=m)
        tl.debug_barrier()
        tl.atomic_add(bar + bt, 1, sem="release", scope="gpu")
        while tl.atomic_add(bar + bt, 0, sem="acquire", scope="gpu") < NP * (t + 1):
            pass
        tl.debug_barrier()
        hp = y + t * B * H + rm[:, None] * H + rk[None, :]
        gp += B * 4 * H
        yp += B * H
        t += 1


@triton.jit
def lstm_bwd_kernel(a, r, cprev, dy, da, T, B, H: tl.constexpr, BM: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.arange(0, H)
    rk = tl.arange(0, H)
    rp = r + rk[:, None] * H + rn[None, :]
    ri = tl.load(rp)
    rf = tl.load(rp + H * H)
    rg = tl.load(rp + 2 * H * H)
    ro = tl.load(rp + 3 * H * H)
    m = rm[:, None] < B
    off = rm[:, None] * H + rn[None, :]
    dh = tl.zeros((BM, H), tl.float32)
    dc = tl.zeros((BM, H), tl.float32)
    goff = rm[:, None] * (4 * H) + rn[None, :]
    t = T - 1
    while t >= 0:
        ap = a + t * B * 4 * H + goff
        i = sigm(tl.load(ap, mask=m, other=0.).to(tl.float32))
        f = sigm(tl.load(ap + H, mask=m, other=0.).to(tl.float32))
        g = tanh(tl.load(ap + 2 * H, mask=m, other=0.).to(tl.float32))
        o = sigm(tl.load(ap + 3 * H, mask=m, other=0.).to(tl.float32))
        cp = tl.load(cprev + t * B * H + off, mask=m, other=0.)
        tc = tanh(f * cp + i * g)
        dh += tl.load(dy + t * B * H + off, mask=m, other=0.).to(tl.float32)
        do = (dh * tc * o * (1 - o)).to(a.dtype.element_ty)
        dc += dh * o * (1 - tc * tc)
        di = (dc * g * i * (1 - i)).to(a.dtype.element_ty)
        df = (dc * cp * f * (1 - f)).to(a.dtype.element_ty)
        dg = (dc * i * (1 - g * g)).to(a.dtype.element_ty)
        dc = dc * f
        dap = da + t * B * 4 * H + goff
        tl.store(dap, di, mask=m)
        tl.store(dap + H, df, mask=m)
        tl.store(dap + 2 * H, dg, mask=m)
        tl.store(dap + 3 * H, do, mask=m)
        dh = tl.dot(di, ri)
        dh = tl.dot(df, rf, dh)
        dh = tl.dot(dg, rg, dh)
        dh = tl.dot(do, ro, dh)
        t -= 1


@gluon.jit
def gtanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gsigm(x):
    return gtanh(0.5 * x) * 0.5 + 0.5


@gluon.jit
def gluon_lstm_kernel(gx, w, h0, c0, y, T, B, H: gl.constexpr, BM: gl.constexpr, acc_l: gl.constexpr,
                      ONE_TILE: gl.constexpr):
    a_l: gl.constexpr = gl.DotOperandLayout(0, acc_l, 2)
    b_l: gl.constexpr = gl.DotOperandLayout(1, acc_l, 2)
    rk = gl.arange(0, H, gl.SliceLayout(1, b_l))
    rn = gl.arange(0, H, gl.SliceLayout(0, b_l))
    wp = w + rk[:, None] * H + rn[None, :]
    wi = gl.load(wp)
    wf = gl.load(wp + H * H)
    wg = gl.load(wp + 2 * H * H)
    wo = gl.load(wp + 3 * H * H)
    am = gl.arange(0, BM, gl.SliceLayout(1, acc_l))
    if not ONE_TILE:
        am = am + gl.program_id(0) * BM
    an = gl.arange(0, H, gl.SliceLayout(0, acc_l))
    m = am[:, None] < B
    off = am[:, None] * H + an[None, :]
    h = gl.convert_layout(gl.load(h0 + off, mask=m, other=0.), a_l)
    c = gl.load(c0 + off, mask=m, other=0.)
    gp = gx + am[:, None] * (4 * H) + an[None, :]
    yp = y + off
    t = 0
    while t < T:
        i = mma_v2(h, wi, gl.load(gp, mask=m, other=0.).to(gl.float32))
        f = mma_v2(h, wf, gl.load(gp + H, mask=m, other=0.).to(gl.float32))
        g = mma_v2(h, wg, gl.load(gp + 2 * H, mask=m, other=0.).to(gl.float32))
        o = mma_v2(h, wo, gl.load(gp + 3 * H, mask=m, other=0.).to(gl.float32))
        c = gsigm(f) * c + gsigm(i) * gtanh(g)
        hd = (gsigm(o) * gtanh(c)).to(gl.bfloat16)
        gl.store(yp, hd, mask=m)
        h = gl.convert_layout(hd, a_l)
        gp += B * 4 * H
        yp += B * H
        t += 1


@gluon.jit
def gluon_wgmma_kernel(a, b, c, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, REGS: gl.constexpr):
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    am = gl.arange(0, M, gl.SliceLayout(1, bl))
    ak = gl.arange(0, K, gl.SliceLayout(0, bl))
    bk = gl.arange(0, K, gl.SliceLayout(1, bl))
    bn = gl.arange(0, N, gl.SliceLayout(0, bl))
    sa = gl.allocate_shared_memory(gl.float16, [M, K], gl.NVMMASharedLayout.get_default_for([M, K], gl.float16))
    sb = gl.allocate_shared_memory(gl.float16, [K, N], gl.NVMMASharedLayout.get_default_for([K, N], gl.float16))
    copy_async(sa, a + am[:, None] * K + ak[None, :])
    copy_async(sb, b + bk[:, None] * N + bn[None, :])
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    async_copy.commit_group()
    async_copy.wait_group(0)
    sync_threads()
    fence_async_shared()
    mbarrier.arrive(bar, count=1)
    mbarrier.wait(bar, 0)
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    acc = gl.zeros([M, N], gl.float32, L)
    if REGS:
        acc = warpgroup_mma(sa.load(gl.DotOperandLayout(0, L, 2)), sb, acc, is_async=True)
    else:
        acc = warpgroup_mma(sa, sb, acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    mbarrier.invalidate(bar)
    cm = gl.arange(0, M, gl.SliceLayout(1, L))
    cn = gl.arange(0, N, gl.SliceLayout(0, L))
    gl.store(c + cm[:, None] * N + cn[None, :], acc)


@gluon.jit
def ws_producer(x, sm, full, empty, n, N: gl.constexpr, W: gl.constexpr):
    i = gl.arange(0, N, gl.BlockedLayout([1], [32], [W], [0]))
    for t in range(n):
        mbarrier.wait(empty, (t & 1) ^ 1)
        sm.store(gl.load(x + t * N + i))
        mbarrier.arrive(full, count=1)


@gluon.jit
def ws_consumer(y, sm, full, empty, n, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, N, layout)
    for t in range(n):
        mbarrier.wait(full, t & 1)
        v = sm.load(layout)
        mbarrier.arrive(empty, count=1)
        gl.store(y + t * N + i, v * 2)


@gluon.jit
def ws_kernel(x, y, n, N: gl.constexpr, W: gl.constexpr):
    sm = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize([(ws_consumer, (y, sm, full, empty, n, N)), (ws_producer, (x, sm, full, empty, n, N, W))],
                       [W], [40])


# ------------------------------------------------------------------------------------------------ references
LSTM_SIG = dict(gx="*bf16", w="*bf16", h0="*bf16", c0="*fp32", y="*bf16", T="i32", B="i32")


def lstm_inputs(T, B, H, seed=0):
    return (rand(T, B, 4 * H, dtype=torch.bfloat16, seed=seed), rand(4, H, H, dtype=torch.bfloat16, scale=H**-.5),
            rand(B, H, dtype=torch.bfloat16), rand(B, H), torch.zeros(T, B, H, dtype=torch.bfloat16))


def lstm_reference(gx, w, h, c):
    T, B, H4 = gx.shape
    H = H4 // 4
    h, c, ys = h.double(), c.double(), []
    for t in range(T):
        a = gx[t].double().view(B, 4, H) + torch.einsum("bk,gkn->bgn", h, w.double())
        c = torch.sigmoid(a[:, 1]) * c + torch.sigmoid(a[:, 0]) * torch.tanh(a[:, 2])
        h = (torch.sigmoid(a[:, 3]) * torch.tanh(c)).bfloat16().double()
        ys.append(h)
    return torch.stack(ys)


# ------------------------------------------------------------------------------------------------ results
ARCHES = [80, 90]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "i8": torch.int8,
          "fp8e5": torch.float8_e5m2, "fp8e4nv": torch.float8_e4m3fn}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_add(arch, dtype):
    ty = DTYPES[dtype]
    sig = dict(x=f"*{dtype}", y=f"*{dtype}", z=f"*{dtype}", n="i32")
    ck = build(add_kernel, sig, dict(BLOCK=256, MASKED=True), arch)
    x, y, z = rand(700, dtype=ty), rand(700, dtype=ty, seed=5), torch.zeros(700, dtype=ty)
    s = launch(ck, (3,), x, y, z, 700)
    assert torch.equal(z, x + y)
    assert s.global_store == 700 * z.element_size()
    xn, zn = np.arange(700, dtype=np.float32), np.zeros(700, np.float32)
    if dtype == "fp32":
        launch(ck, (3,), xn, xn, zn, 700)
        assert (zn == 2 * xn).all()


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_softmax(arch, warps, dtype):
    ty = DTYPES[dtype]
    ck = build(softmax_kernel, dict(x=f"*{dtype}", y=f"*{dtype}", n="i32"), dict(BLOCK=512), arch, num_warps=warps)
    x, y = rand(3, 400, dtype=ty, scale=3), torch.zeros(3, 400, dtype=ty)
    launch(ck, (3,), x, y, 400)
    close(y, torch.softmax(x.double(), 1), 1e-6 if dtype == "fp32" else 4e-3)


# (BM, BN, BK, warps, stages)
TILES = [(32, 32, 32, 2, 3), (64, 64, 32, 4, 3), (64, 128, 64, 4, 3)]
BF16_TILES = [(16, 16, 16, 1, 1), (32, 64, 32, 4, 1), (64, 64, 32, 4, 1), (128, 64, 32, 8, 3), (16, 64, 64, 8, 3)]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype,tile", [(dtype, tile) for dtype in ("fp16", "bf16", "fp32") for tile in TILES]
                         + [("bf16", tile) for tile in BF16_TILES])
def test_matmul(arch, dtype, tile):
    BM, BN, BK, warps, stages = tile
    ty = DTYPES[dtype]
    ck = build(matmul_kernel, dict(a=f"*{dtype}", b=f"*{dtype}", c="*fp32", K="i32"), dict(BM=BM, BN=BN, BK=BK), arch,
               num_warps=warps, num_stages=stages)
    M, N, K = 2 * BM, BN, 4 * BK
    a, b, c = rand(M, K, dtype=ty), rand(K, N, dtype=ty, seed=3), torch.zeros(M, N)
    s = launch(ck, (2, 1), a, b, c, K)
    assert any("mma" in k for k in s.instructions)
    if dtype == "fp32":  # tensor cores drop the low 13 bits: tf32
        a, b = ((x.view(torch.int32) & -8192).view(torch.float32) for x in (a, b))
    close(c, a.double() @ b.double(), 1e-5)


TYPES = {"fp16": ("fp16", 2e-2), "i8": ("i32", 1e-9), "fp8e5": ("fp32", 1e-5), "fp8e4nv": ("fp32", 1e-5)}
# sm_89 has fp8 products in addition to the types of sm_80; all else is the same code
TYPE_CASES = [(80, "fp16"), (80, "i8"), (80, "fp8e5"), (89, "fp8e5"), (89, "fp8e4nv")] + [(90, k) for k in TYPES]


@pytest.mark.parametrize("arch,dtype", TYPE_CASES)
@pytest.mark.parametrize("warps,transposed", [(2, False), (4, True)])
def test_matmul_types(arch, dtype, warps, transposed):
    out, tol = TYPES[dtype]
    tin, tout = DTYPES[dtype], DTYPES[out]
    lout = {"fp16": tl.float16, "i32": tl.int32, "fp32": tl.float32}[out]
    BM, K = 16 * warps, 128
    ck = build(matmul_types_kernel, dict(a=f"*{dtype}", b=f"*{dtype}", c=f"*{out}", K="i32"),
               dict(BM=BM, BN=64, BK=64, OUT=lout, TRANSPOSED=transposed), arch, num_warps=warps)
    scale = 5 if dtype == "i8" else 0.5
    a, b = rand(BM, K, scale=scale).to(tin), rand(K, 64, scale=scale, seed=2).to(tin)
    c = torch.zeros(BM, 64, dtype=tout)
    stored = b.t().contiguous() if transposed else b
    s = launch(ck, (1,), a.view(torch.uint8) if a.itemsize == 1 else a,
                 stored.view(torch.uint8) if a.itemsize == 1 else stored, c, K)
    assert any("mma" in k for k in s.instructions)
    close(c, a.double() @ b.double(), tol)


@pytest.mark.parametrize("arch", ARCHES)
def test_math(arch):
    ck = build(math_kernel, dict(x="*fp32", k="*i32", f="*fp32", j="*i32", n="i32"), dict(BLOCK=256), arch)
    v = rand(256, scale=3.0)
    v[5] = 1e6  # takes the slow path of sin and cos, so that threads diverge
    i = torch.randint(-1000, 1000, (256,), dtype=torch.int32, generator=gen())
    f, j = torch.zeros(256 + 4), torch.zeros(256 + 32, dtype=torch.int32)
    launch(ck, (1,), v, i, f, j, 256)
    d = v.double()
    want = (d.exp() + (d.abs() + 1).log() + d.sin() + d.cos() + d.floor() + d.abs().sqrt() + d.cumsum(0)
            + d.sort().values + torch.erf(d) + d / (d.abs() + 1))
    finite = torch.isfinite(f[:256])
    assert (~finite).sum() == 1 and not finite[5]
    close(f[:256][finite], want[finite], 1e-5)
    n = i.numpy().astype(np.int64)
    quot = np.trunc(n / 7).astype(np.int64)
    rem = n - 5 * np.trunc(n / 5).astype(np.int64)
    wantj = (quot + rem * 3 + (n >> 2) + np.sort(n) + np.cumsum(n) + 5 + (v.bfloat16().double().numpy() * 256).astype(
        np.int64) + (v.half() * 64).float().numpy().clip(-2**31, 2**31 - 1).astype(np.int64))
    keep = np.arange(256) != 5
    assert (j[:256].numpy()[keep] == wantj[keep]).all()
    hist = np.bincount(n & 7, minlength=8)
    assert (j[256:264].numpy() == hist).all() and (j[272:280].numpy() == hist).all()
    assert j[264] == max(0, n.max())
    close(f[256:], d.view(64, 4).sum(0), 1e-4)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("H,warps,B", [(32, 2, 16), (64, 4, 11), (64, 8, 16)])
def test_lstm_forward(arch, H, warps, B):
    ck = build(lstm_kernel, LSTM_SIG, dict(H=H, BM=16), arch, num_warps=warps)
    gx, w, h0, c0, y = lstm_inputs(4, B, H)
    launch(ck, (1,), gx, w, h0, c0, y, 4, B)
    close(y, lstm_reference(gx, w, h0, c0), 1e-2)


def grid_case(T=4, B=16, H=64, HB=16, arch=90):
    sig = {**{k: LSTM_SIG[k] for k in ("gx", "w", "h0", "c0", "y")}, "bar": "*i32", "T": "i32", "B": "i32"}
    ck = build(grid_lstm_kernel, sig, dict(H=H, HB=HB, BM=16), arch, num_warps=4)
    gx, w, h0, c0, y = lstm_inputs(T, B, H)
    # the gates of one unit side by side
    gxp = gx.view(T, B, 4, H).transpose(2, 3).reshape(T, B, 4 * H).contiguous()
    wp = w.permute(1, 2, 0).reshape(H, 4 * H).contiguous()
    want = lstm_reference(gx, w, h0, c0)

    def go(ptx=None, grid=(H // HB, 1), **kw):
        y.zero_()
        bar = torch.zeros(8, dtype=torch.int32)
        launch(ck, grid, gxp, wp, h0, c0, y, bar, T, B, ptx=ptx, **kw)
        return (y.double() - want).abs().max().item()
    return ck, go


@pytest.mark.parametrize("memory", ["sc", "weak"])
@pytest.mark.parametrize("seed", range(4))
def test_grid_lstm(memory, seed):
    ck, go = grid_case()
    assert go(memory=memory, seed=seed) < 1e-2


def outcomes(go, ptx, seeds=8, **kw):
    """Yields for each seed whether the kernel gave the right numbers."""
    for seed in range(seeds):
        try:
            yield go(ptx, seed=seed, patience=300, **kw) < 1e-2
        except Deadlock:
            yield False


def edited(ptx, pattern, new):
    out, n = re.subn(pattern, new, ptx)
    assert n, f"{pattern} not in the PTX"
    return out


@pytest.mark.parametrize("arch", ARCHES)
def test_missing_release(arch):
    ck, go = grid_case(arch=arch)
    ptx = edited(ck.asm["ptx"], r"gpu\.release", "gpu.relaxed")
    assert not all(outcomes(go, ptx, memory="weak"))
    assert all(outcomes(go, ptx, seeds=2, memory="sc"))


@pytest.mark.parametrize("arch", ARCHES)
def test_missing_acquire(arch):
    ck, go = grid_case(arch=arch)
    ptx = edited(ck.asm["ptx"], r"gpu\.acquire", "gpu.relaxed")
    assert not all(outcomes(go, ptx, memory="weak"))


@pytest.mark.parametrize("arch", ARCHES)
def test_fences_instead(arch):
    ck, go = grid_case(arch=arch)
    ptx = edited(ck.asm["ptx"], r"(@%p\d+) ((?:red|atom)[\w.]*)gpu\.release", r"fence.acq_rel.gpu; \1 \2gpu.relaxed")
    ptx = edited(ptx, r"(@%p\d+ \w+\.global\.gpu)\.acquire([^;]*;)", r"\1.relaxed\2 fence.acq_rel.gpu;")
    assert all(outcomes(go, ptx, memory="weak"))
    assert not all(outcomes(go, edited(ptx, r"fence.acq_rel.gpu; (@%p\d+ (red|atom))", r"\1"), memory="weak"))


def test_missing_barrier_before_release():
    ck, go = grid_case()
    ptx = ck.asm["ptx"]
    for _ in range(2):  # without these barriers only the stores of thread 0 are released
        k = ptx.rindex("bar.sync", 0, ptx.index("gpu.release"))
        ptx = ptx[:k] + ptx[ptx.index(";", k) + 1:]
    assert not all(outcomes(go, ptx, memory="weak", checks=False))


@pytest.mark.parametrize("memory", ["sc", "weak"])
def test_missing_wait(memory):
    ck, go = grid_case()
    ptx = edited(ck.asm["ptx"], r"(?s)(gpu\.acquire.*?)@%p\d+ bra[^;]*;", r"\1")
    assert not all(outcomes(go, ptx, memory=memory))


def test_deadlock():
    ck, go = grid_case()
    with pytest.raises(Deadlock, match="CTA"):
        go(grid=(3, 1), patience=300)  # one program of the barrier is not launched
    with pytest.raises(Deadlock, match="2 not started"):
        go(resident=2, patience=300)  # not all resident at once


@pytest.mark.parametrize("H,warps", [(32, 4), (64, 4)])
def test_lstm_backward(H, warps):
    T, B = 3, 13
    sig = dict(a="*bf16", r="*bf16", cprev="*fp32", dy="*bf16", da="*bf16", T="i32", B="i32")
    ck = build(lstm_bwd_kernel, sig, dict(H=H, BM=16), num_warps=warps)
    a, w = rand(T, B, 4 * H, dtype=torch.bfloat16), rand(4, H, H, dtype=torch.bfloat16, scale=H**-.5)
    cprev, dy = rand(T, B, H), rand(T, B, H, dtype=torch.bfloat16)
    da = torch.zeros(T, B, 4 * H, dtype=torch.bfloat16)
    launch(ck, (1,), a, w.transpose(1, 2).contiguous(), cprev, dy, da, T, B)
    dh, dc, want = torch.zeros(B, H).double(), torch.zeros(B, H).double(), [None] * T
    for t in reversed(range(T)):
        x = a[t].double().view(B, 4, H)
        i, f, g, o = torch.sigmoid(x[:, 0]), torch.sigmoid(x[:, 1]), torch.tanh(x[:, 2]), torch.sigmoid(x[:, 3])
        cp = cprev[t].double()
        tc = torch.tanh(f * cp + i * g)
        dh = dh + dy[t].double()
        dc = dc + dh * o * (1 - tc * tc)
        d = torch.stack([dc * g * i * (1 - i), dc * cp * f * (1 - f), dc * i * (1 - g * g), dh * tc * o * (1 - o)], 1)
        d = d.bfloat16().double()
        dc = dc * f
        want[t] = d.reshape(B, 4 * H)
        dh = torch.einsum("bgn,gkn->bk", d, w.double())
    close(da, torch.stack(want), 1e-2)


def gluon_case(H, warps, ctas, T=3, B=14, BM=16, one_tile=True):
    basis = [[0, 1 << j] for j in range(ctas.bit_length() - 1)]
    layout = gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8], *([basis] if basis else []))
    ck = build(gluon_lstm_kernel, LSTM_SIG, dict(H=H, BM=BM, acc_l=layout, ONE_TILE=one_tile), gl_src=True,
               num_warps=warps, num_ctas=ctas)
    gx, w, h0, c0, y = lstm_inputs(T, B, H)
    want = lstm_reference(gx, w, h0, c0)

    def go(grid=(1,), **kw):
        y.zero_()
        stats = launch(ck, grid, gx, w, h0, c0, y, T, B, **kw)
        return (y.double() - want).abs().max().item(), stats
    return ck, go


@pytest.mark.parametrize("H,warps", [(32, 1), (64, 4), (64, 8)])
def test_gluon_one_cta(H, warps):
    ck, go = gluon_case(H, warps, 1, one_tile=False)
    err, stats = go()
    assert err < 1e-2 and any("tanh.approx" in k for k in stats.instructions)


@needs_cluster
@pytest.mark.parametrize("H,warps,ctas", [(64, 4, 2), (64, 4, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_gluon_cluster(H, warps, ctas, seed):
    ck, go = gluon_case(H, warps, ctas)
    assert "shared::cluster" in ck.asm["ptx"]
    err, stats = go(seed=seed)
    assert err < 1e-2 and stats.cluster_barriers > 0


@needs_cluster
def test_gluon_clusters_in_a_grid():
    ck, go = gluon_case(64, 4, 2, B=27, one_tile=False)
    assert go(grid=(2,), memory="weak", every=50, seed=3)[0] < 1e-2


@needs_cluster
@pytest.mark.parametrize("ctas", [2, 4])
def test_cluster_barrier_deleted(ctas):
    ck, go = gluon_case(64, 4, ctas)
    ptx = ck.asm["ptx"]
    pairs = list(re.finditer(r"barrier\.cluster\.arrive[\w.]*;\s*(\.loc[^\n]*\s*)*barrier\.cluster\.wait[\w.]*;", ptx))
    assert pairs
    for m in pairs:  # the last one keeps a CTA from exiting early
        with pytest.raises((SharedRace, OutOfBounds)):
            for seed in range(4):
                go(ptx=ptx[:m.start()] + ptx[m.end():], seed=seed)


@pytest.mark.parametrize("W", [1, 4])
def test_gluon_warp_specialised(W):
    ck = build(ws_kernel, dict(x="*fp32", y="*fp32", n="i32"), dict(N=256, W=W), gl_src=True, num_warps=4)
    x, y = rand(5, 256), torch.zeros(5, 256)
    for seed in range(5):
        y.zero_()
        launch(ck, (1,), x, y, 5, seed=seed)
        assert torch.equal(y, 2 * x)
    ptx = ck.asm["ptx"]
    arrives = list(re.finditer(r"@%p\d+ mbarrier\.arrive[^;]*;", ptx))
    assert len(arrives) == 2
    for m in arrives:
        with pytest.raises(Deadlock, match="waitLoop|try_wait"):
            launch(ck, (1,), x, y, 5, patience=300, ptx=ptx[:m.start()] + ptx[m.end():])
    for wait in re.finditer(r"@!complete bra.uni waitLoop;", ptx):
        found = 0
        for seed in range(10):
            y.zero_()
            try:
                launch(ck, (1,), x, y, 5, seed=seed, patience=300, ptx=ptx[:wait.start()] + ptx[wait.end():])
                found += not torch.equal(y, 2 * x)
            except EmulatorError:
                found += 1
        assert found


@pytest.mark.parametrize("M,N,K", [(64, 64, 64), (128, 32, 32), (64, 128, 128)])
@pytest.mark.parametrize("regs", [False, True])
def test_gluon_wgmma(M, N, K, regs):
    ck = build(gluon_wgmma_kernel, dict(a="*fp16", b="*fp16", c="*fp32"), dict(M=M, N=N, K=K, REGS=regs), gl_src=True,
               num_warps=4)
    a, b, c = rand(M, K, dtype=torch.float16), rand(K, N, dtype=torch.float16), torch.zeros(M, N)
    stats = launch(ck, (1,), a, b, c)
    assert any("wgmma.mma" in k for k in stats.instructions) and any("try_wait" in k for k in stats.instructions)
    close(c, a.double() @ b.double(), 1e-5)
    ptx = edited(ck.asm["ptx"], r"@%p\d+ mbarrier\.arrive[^;]*;", "")
    with pytest.raises(Deadlock, match="try_wait|bra"):
        launch(ck, (1,), a, b, c, ptx=ptx, patience=100)


# ------------------------------------------------------------------------------------------------ checks fire
def test_out_of_bounds():
    ck = build(add_kernel, dict(x="*fp32", y="*fp32", z="*fp32", n="i32"), dict(BLOCK=256, MASKED=False))
    x = rand(700)
    with pytest.raises(OutOfBounds, match=r"store.*'z'.*test_ptx_emulator.py:\d+"):
        launch(ck, (3,), x, x, torch.zeros(700), 700)


def test_shared_race():
    ck = build(matmul_kernel, dict(a="*fp16", b="*fp16", c="*fp32", K="i32"), dict(BM=32, BN=32, BK=32), 80,
               num_warps=4, num_stages=1)
    a, b, c = rand(32, 64, dtype=torch.float16), rand(64, 32, dtype=torch.float16), torch.zeros(32, 32)
    bars = [m.span() for m in re.finditer(r"bar\.sync\s+0;", ck.asm["ptx"])]
    found = 0
    for s, e in bars:
        try:
            launch(ck, (1,), a, b, c, 64, ptx=ck.asm["ptx"][:s] + ck.asm["ptx"][e:])
        except SharedRace:
            found += 1
    assert found == len(bars)
    launch(ck, (1,), a, b, c, 64)


def test_softmax_race():
    ck = build(softmax_kernel, dict(x="*fp32", y="*fp32", n="i32"), dict(BLOCK=512), num_warps=4)
    x, y = rand(1, 400), torch.zeros(1, 400)
    ptx = edited(ck.asm["ptx"], r"bar\.sync\s+0;", "")
    with pytest.raises(SharedRace):
        launch(ck, (1,), x, y, 400, ptx=ptx)


def test_unknown_instruction():
    ck = build(add_kernel, dict(x="*fp32", y="*fp32", z="*fp32", n="i32"), dict(BLOCK=256, MASKED=True))
    ptx = edited(ck.asm["ptx"], r"add\.f32", "frobnicate.f32")
    with pytest.raises(Unsupported, match="frobnicate.f32.*line"):
        launch(ck, (1,), rand(256), rand(256), rand(256), 256, ptx=ptx)


# ------------------------------------------------------------------------------------------------ single instructions
# Each of 64 threads has x, y, z, w, 32 bits each, in %r1 to %r4, z & 31 in %r5, w & 31 in %r6, and the address of 16
# bytes of shared memory for itself in %r20.  The result goes to %r10.
TEMPLATE = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(
    .param .u64 src,
    .param .u64 dst
)
.reqntid 64
{
    .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .pred %p<5>; .reg .b16 %rs<10>; .reg .b128 %q1;
    .local .align 16 .b8 stack[16];
    ld.param.b64 %rd1, [src]; ld.param.b64 %rd2, [dst];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd3, %r0, 16, %rd1;
    mad.wide.u32 %rd4, %r0, 4, %rd2;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd3];
    and.b32 %r5, %r3, 31; and.b32 %r6, %r4, 31;
    mov.b32 %r20, smem; mad.lo.u32 %r20, %r0, 16, %r20;
    BODY
    st.global.b32 [%rd4], %r10;
    ret;
}
"""
MASK = 2**32 - 1


def signed(x, bits=32):
    x &= 2**bits - 1
    return x - 2**bits if x >> (bits - 1) else x


def as_float(x):
    with np.errstate(invalid="ignore"):  # some are signalling NaNs
        return np.array(x, np.uint32).view(np.float32).astype(np.float64)


def ref_prmt(x, y, z, w):
    b = [(y << 32 | x) >> 8 * j & 255 for j in range(8)]
    out = 0
    for j in range(4):
        s = z >> 4 * j & 15
        v = b[s & 7]
        out |= ((255 if v & 128 else 0) if s & 8 else v) << 8 * j
    return out


def ref_bfe(x, p, n):
    v = x >> p & (2**n - 1)
    top = min(p + n - 1, 31)
    return (v | -(1 << n) if n and x >> top & 1 else v) & MASK


def to_int(v, lo, hi, how):
    return 0 if v != v else int(min(max(how(v), lo), hi)) & MASK


SINGLE = {
    "prmt.b32 %r10, %r1, %r2, %r3;": ref_prmt,
    "bfe.u32 %r10, %r1, %r5, %r6;": lambda x, y, z, w: x >> (z & 31) & (2**(w & 31) - 1),
    "bfe.s32 %r10, %r1, %r5, %r6;": lambda x, y, z, w: ref_bfe(x, z & 31, w & 31),
    "bfi.b32 %r10, %r1, %r2, %r5, %r6;": lambda x, y, z, w: (y & ~((2**(w & 31) - 1) << (z & 31)) | (
        x & 2**(w & 31) - 1) << (z & 31)) & MASK,
    "lop3.b32 %r10, %r1, %r2, %r3, 0xE8;": lambda x, y, z, w: x & y | x & z | y & z,
    "lop3.b32 %r10, %r1, %r2, %r3, 0x1B;": lambda x, y, z, w: sum(
        (0x1B >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32)),
    "shf.l.wrap.b32 %r10, %r1, %r2, %r3;": lambda x, y, z, w: ((y << 32 | x) << (z & 31)) >> 32,
    "shf.r.clamp.b32 %r10, %r1, %r2, %r5;": lambda x, y, z, w: (y << 32 | x) >> (z & 31),
    "shl.b32 %r10, %r1, %r4;": lambda x, y, z, w: x << w if w < 32 else 0,
    "shr.s32 %r10, %r1, %r6;": lambda x, y, z, w: signed(x) >> (w & 31),
    "shr.s32 %r10, %r1, 40;": lambda x, y, z, w: signed(x) >> 31,
    "mul.hi.s32 %r10, %r1, %r2;": lambda x, y, z, w: signed(x) * signed(y) >> 32,
    "mul.hi.u32 %r10, %r1, %r2;": lambda x, y, z, w: x * y >> 32,
    "mad.lo.s32 %r10, %r1, %r2, %r3;": lambda x, y, z, w: x * y + z,
    "mul.wide.s32 %rd5, %r1, %r2; mov.b64 {%r9, %r10}, %rd5;": lambda x, y, z, w: signed(x) * signed(y) >> 32,
    "mad.wide.u32 %rd5, %r1, %r2, %rd1; sub.s64 %rd5, %rd5, %rd1; shr.u64 %rd5, %rd5, 20; cvt.u32.u64 %r10, %rd5;":
        lambda x, y, z, w: x * y >> 20,
    "cvt.u64.u32 %rd5, %r1; shl.b64 %rd5, %rd5, 31; mul.hi.u64 %rd5, %rd5, %rd5; cvt.u32.u64 %r10, %rd5;":
        lambda x, y, z, w: (x << 31)**2 >> 64,
    "div.s32 %r10, %r1, %r5;": lambda x, y, z, w: (-1 if not z & 31 else
                                                  (abs(signed(x)) // (z & 31)) * (1 if signed(x) > 0 else -1)),
    "rem.u32 %r10, %r1, %r2;": lambda x, y, z, w: x % y,
    "add.cc.u32 %r9, %r1, %r2; addc.u32 %r10, %r3, %r4;": lambda x, y, z, w: z + w + (x + y >> 32),
    "sub.cc.u32 %r9, %r1, %r2; subc.u32 %r10, %r3, %r4;": lambda x, y, z, w: z - w - (x < y),
    "mad.lo.cc.u32 %r9, %r1, %r2, %r3; madc.hi.u32 %r10, %r1, %r2, 0;": lambda x, y, z, w: x * y + z >> 32,
    "popc.b32 %r10, %r1;": lambda x, y, z, w: bin(x).count("1"),
    "clz.b32 %r10, %r1;": lambda x, y, z, w: 32 - x.bit_length(),
    "bfind.u32 %r10, %r1;": lambda x, y, z, w: x.bit_length() - 1,
    "brev.b32 %r10, %r1;": lambda x, y, z, w: int(f"{x:032b}"[::-1], 2),
    "min.s32 %r10, %r1, %r2;": lambda x, y, z, w: min(signed(x), signed(y)),
    "max.u32 %r10, %r1, %r2;": lambda x, y, z, w: max(x, y),
    "cvt.s32.s8 %r10, %r1;": lambda x, y, z, w: signed(x, 8),
    "cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r10, %rs1;": lambda x, y, z, w: signed(x, 16),
    "cvt.sat.s16.s32 %rs1, %r1; cvt.s32.s16 %r10, %rs1;": lambda x, y, z, w: max(-2**15, min(2**15 - 1, signed(x))),
    "cvt.rni.s32.f32 %r10, %r1;": lambda x, y, z, w: to_int(as_float(x), -2**31, 2**31 - 1, np.rint),
    "cvt.rzi.u32.f32 %r10, %r1;": lambda x, y, z, w: to_int(as_float(x), 0, 2**32 - 1, np.trunc),
    "cvt.rn.f32.u32 %r10, %r1;": lambda x, y, z, w: int(np.float32(x).view(np.uint32)),
    "setp.lt.and.s32 %p2, %r1, %r2, %p1; @%p2 mov.b32 %r10, %r1; @!%p2 mov.b32 %r10, %r2;":
        lambda x, y, z, w: y,
    "setp.lt.s32 %p1|%p2, %r1, %r2; selp.b32 %r10, %r3, %r4, %p2;":
        lambda x, y, z, w: w if signed(x) < signed(y) else z,
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r10, {%rs2, %rs1};": lambda x, y, z, w: x >> 16 | x << 16,
    "{ .reg .b32 %r1; mov.b32 %r1, %r2; add.u32 %r1, %r1, 7; mov.b32 %r10, %r1; }": lambda x, y, z, w: y + 7,
    "copysign.f32 %r10, %r1, %r2;": lambda x, y, z, w: y & 0x7FFFFFFF | x & 0x80000000,
    "st.local.v2.b32 [stack+8], {%r1, %r2}; ld.local.b32 %r10, [stack+12];": lambda x, y, z, w: y,
    "cvt.u64.u32 %rd5, %r20; cvta.shared.u64 %rd5, %rd5; st.b32 [%rd5+4], %r1; ld.shared.b32 %r10, [%r20+4];":
        lambda x, y, z, w: x,
    "mov.b64 %rd5, {%r1, %r2}; mov.b64 %rd6, {%r3, %r4}; mov.b128 %q1, {%rd5, %rd6}; st.shared.b128 [%r20], %q1; "
    "ld.shared.v4.b32 {%r11, %r12, %r13, %r10}, [%r20];": lambda x, y, z, w: w,
    "cp.async.ca.shared.global [%r20], [%rd3], 16; cp.async.wait_all; ld.shared.b32 %r10, [%r20+4];":
        lambda x, y, z, w: y,
    "cp.async.ca.shared.global [%r20], [%rd3], 16, 4; cp.async.wait_all; ld.shared.b32 %r10, [%r20+4];":
        lambda x, y, z, w: 0,
    "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [smem+1024], 64; bar.sync 0; "
    "cp.async.ca.shared.global [%r20], [%rd3], 16; cp.async.mbarrier.arrive.noinc.shared.b64 [smem+1024];\n"
    "L1: mbarrier.try_wait.parity.shared.b64 %p2, [smem+1024], 0; @!%p2 bra L1; ld.shared.b32 %r10, [%r20+4];":
        lambda x, y, z, w: y,
    "and.b32 %r7, %r3, 1; brx.idx %r7, TABLE;\nTABLE: .branchtargets L1, L2;\nL1: mov.b32 %r10, %r2; bra L3;\n"
    "L2: mov.b32 %r10, %r1;\nL3: mov.b32 %r9, 0;": lambda x, y, z, w: x if z & 1 else y,
    "setp.gt.u32 %p1, %r0, 40; @%p1 bra L1; mov.b32 %r10, %r1; bra.uni L2;\n"
    "L1: mov.b32 %r10, %r2;\nL2: mov.b32 %r9, 0;": None,  # depends on the thread, see the test
}


ST_ASYNC = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(
    .param .u64 dst
)
.reqntid 64
.reqnctapercluster 2
{
    .reg .b32 %r<20>; .reg .b64 %rd<9>; .reg .pred %p<5>;
    ld.param.b64 %rd1, [dst];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %cluster_ctarank; mov.u32 %r9, %ctaid.x;
    setp.eq.u32 %p1, %r0, 0;
    mov.b32 %r2, smem;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 %r3, %r1, 1;
    mapa.shared::cluster.u32 %r4, %r2, %r3;
    shl.b32 %r5, %r0, 2;
    add.u32 %r6, %r4, %r5;
    mad.lo.u32 %r7, %r9, 100, %r0;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r6+16], %r7, [%r4];
$WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra $WAIT;
    add.u32 %r8, %r2, %r5;
    ld.shared.b32 %r10, [%r8+16];
    mad.lo.u32 %r11, %r9, 64, %r0;
    mad.wide.u32 %rd2, %r11, 4, %rd1;
    st.global.b32 [%rd2], %r10;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    ret;
}
"""


@pytest.mark.parametrize("seed", range(3))
def test_st_async(seed):
    dst = np.zeros((4, 64), np.int32)
    run(ST_ASYNC, (4,), None, [dst], 1024, seed=seed)
    assert (dst == np.array([1, 0, 3, 2])[:, None] * 100 + np.arange(64)).all()
    with pytest.raises(Deadlock, match="try_wait|WAIT"):
        run(ST_ASYNC.replace(", 256;", ", 260;"), (2,), None, [dst], 1024, seed=seed, patience=200)


def test_st_async_to_a_cta_that_has_exited():
    unwaited = ST_ASYNC.replace("@!%p2 bra $WAIT;", "")
    with pytest.raises(OutOfBounds, match="exited"):
        for seed in range(10):
            run(unwaited, (2,), None, [np.zeros((2, 64), np.int32)], 1024, seed=seed, checks=False)


def run_single(body, src):
    dst = np.zeros(64, np.uint32)
    run(TEMPLATE.replace("BODY", body), (1,), None, [src, dst], 2048)
    return dst


@pytest.mark.parametrize("body", list(SINGLE))
def test_single_instruction(body):
    rng = np.random.default_rng(1)
    src = rng.integers(0, 2**32, (64, 4), dtype=np.uint32)
    src[::3, 0] = rng.normal(size=22).astype(np.float32).view(np.uint32)
    src[1::3, 0] = (rng.normal(size=21) * 2e9).astype(np.float32).view(np.uint32)
    src[:40, 3] &= 63
    dst = run_single(body, src)
    f = SINGLE[body]
    want = [f(*map(int, row)) & MASK for row in src] if f else list(np.where(np.arange(64) > 40, src[:, 1], src[:, 0]))
    assert [int(v) for v in dst] == [int(v) for v in want]


@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_packed(kind, dtype):
    x = rand(64, 4)
    src = x.numpy().view(np.uint32)

    def run_packed(body, src):
        return torch.from_numpy(run_single(body, src).view(np.int16)).view(dtype).view(64, 2)
    assert torch.equal(run_packed(f"cvt.rn.{kind}x2.f32 %r10, %r1, %r2;", src), x[:, [1, 0]].to(dtype))
    packed = x.to(dtype)
    src = np.zeros((64, 4), np.uint32)
    src[:, :2] = packed.contiguous().view(torch.int16).numpy().view(np.uint32)
    a, b = packed[:, :2].double(), packed[:, 2:].double()
    for op, want in (("add.rn", a + b), ("mul.rn", a * b), ("max", torch.maximum(a, b))):
        assert torch.equal(run_packed(f"{op}.{kind}x2 %r10, %r1, %r2;", src), want.to(dtype)), op
    assert torch.equal(run_packed(f"fma.rn.{kind}x2 %r10, %r1, %r2, %r1;", src), (a * b + a).to(dtype))


@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mixed_types(kind, dtype):
    """Instructions of sm_100 on f32 that take some operands from 16-bit floats. Others with two types are refused."""
    x = rand(64, 4)
    narrow = x[:, :2].to(dtype)
    src = x.numpy().copy().view(np.uint32)
    src[:, 0] = narrow.contiguous().view(torch.int16).numpy().view(np.uint32)[:, 0]
    (a, b), c = narrow.double().unbind(1), x[:, 2].double()

    def run_mixed(body):
        got = run_single(f"mov.b32 {{%rs1, %rs2}}, %r1; {body}", src)
        return torch.from_numpy(got.view(np.float32))
    assert torch.equal(run_mixed(f"add.rn.f32.{kind} %r10, %rs1, %r3;"), (a + c).float())
    assert torch.equal(run_mixed(f"sub.rn.f32.{kind} %r10, %rs1, %r3;"), (a - c).float())
    assert torch.equal(run_mixed(f"fma.rn.f32.{kind} %r10, %rs1, %rs2, %r3;"), (a * b + c).float())
    with pytest.raises(Unsupported, match="which has two types"):
        run_mixed(f"mul.rn.f32.{kind} %r10, %rs1, %r3;")


@pytest.mark.parametrize("kind,dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8(kind, dtype):
    x = rand(64, 4, scale=100)
    x[::2] *= 1e-4  # subnormals
    body = f"cvt.rn.satfinite.{kind}x2.f32 %rs1, %r1, %r2; cvt.u32.u16 %r10, %rs1;"
    got = run_single(body, x.numpy().view(np.uint32))
    largest = torch.finfo(dtype).max
    want = x[:, [1, 0]].clamp(-largest, largest).to(dtype)
    assert torch.equal(torch.from_numpy(got.astype(np.uint16).view(np.uint8)), want.view(torch.uint8).flatten())


def test_warp_instructions():
    src = np.random.default_rng(2).integers(0, 2**31, (64, 4), dtype=np.uint32)
    x, lane = src[:, 0].astype(np.int64), np.arange(64) & 31
    base = np.arange(64) - lane

    def warps(v):
        return np.asarray(v).reshape(2, 32)
    cases = {
        "shfl.sync.idx.b32 %r10, %r1, 5, 31, -1;": x[base + 5],
        "shfl.sync.bfly.b32 %r10, %r1, 3, 31, -1;": x[base + (lane ^ 3)],
        "shfl.sync.up.b32 %r10, %r1, 2, 0, -1;": x[base + np.where(lane >= 2, lane - 2, lane)],
        "shfl.sync.down.b32 %r10|%p1, %r1, 4, 31, -1; @!%p1 mov.b32 %r10, 9;": np.where(
            lane < 28, x[base + np.minimum(lane + 4, 31)], 9),
        "shfl.sync.idx.b32 %r10, %r1, 1, 0x181F, -1;": x[base + (lane & 24) + 1],
        "setp.gt.u32 %p1, %r1, 0x40000000; vote.sync.ballot.b32 %r10, %p1, -1;": np.repeat(
            [sum(1 << i for i in range(32) if r[i] > 0x40000000) for r in warps(x)], 32),
        "redux.sync.add.u32 %r10, %r1, -1;": np.repeat(warps(x).sum(1) & MASK, 32),
        "redux.sync.max.s32 %r10, %r1, -1;": np.repeat(warps(x).max(1), 32),
        "and.b32 %r7, %r1, 3; match.any.sync.b32 %r10, %r7, -1;": [
            sum(1 << j for j in range(32) if x[b + j] & 3 == x[b + i] & 3) for b in (0, 32) for i in range(32)],
        "elect.sync _|%p1, -1; selp.b32 %r10, 1, 0, %p1;": (lane == 0) * 1,
        "setp.lt.u32 %p1, %r0, 8; mov.b32 %r10, 0; @%p1 activemask.b32 %r10;": np.where(np.arange(64) < 8, 255, 0),
        "mov.u32 %r10, %lanemask_lt;": (1 << lane) - 1,
    }
    for body, want in cases.items():
        assert run_single(body, src).tolist() == np.asarray(want).tolist(), body


@pytest.mark.parametrize("body,error", [
    ("ld.global.b32 %r10, [%rd3+2];", Misaligned),
    ("ld.shared.b32 %r10, [%r20+2];", Misaligned),
    ("ld.global.b32 %r10, [%rd3+16];", OutOfBounds),
    ("ld.shared.b32 %r10, [%r20+2032];", OutOfBounds),
    ("st.shared.b32 [smem], %r0;", SharedRace),
    ("st.shared.b32 [%r20], %r1; xor.b32 %r7, %r20, 16; ld.shared.b32 %r10, [%r7];", SharedRace),
    ("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;", Deadlock),
    ("setp.lt.u32 %p1, %r0, 9; @%p1 trap;", Trap),
])
def test_error_names_its_place(body, error):
    with pytest.raises(error, match=r"CTA \(0, 0, 0\).*PTX line \d+"):
        run_single(body, np.zeros((64, 4), np.uint32))
