"""Runs the kernels over a sequence: input products before the time loop, weight gradients after it."""
import contextlib

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from . import cell
from .backward import backward_grid, backward_resident, coefficients
from .forward import forward_grid, forward_resident

INTERPRET = isinstance(forward_resident, InterpretedFunction)
if not INTERPRET:       # which knows no Gluon
    from .gluon_backward import backward_gluon
    from .gluon_forward import forward_gluon
# Triton's interpreter runs a launch's programs one after the other, so one that waits for another waits for ever.
# Tests that interleave them set this.
interleaved = False


def matmul_precision(plan):
    """cuBLAS products as the plan's."""
    return products_in(plan.precision)


@contextlib.contextmanager
def products_in(precision):
    """cuBLAS products in TF32 where a plan of ``precision`` has them: torch has one switch for nn.LSTM and another for
    matmul.

    The switch is the process's; another thread that multiplies meanwhile sees it.
    """
    if INTERPRET or precision == "native":
        yield
        return
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32" if precision == "tf32" else "ieee") if hasattr(
        matmul, "fp32_precision") else ("allow_tf32", precision == "tf32")
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _round_tf32(v):
    bits = (v.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(v == v, bits.view(torch.float32), v)


def prepare_r(r, plan):
    """R (D, 4H, H) as the kernels read it: rounded to TF32 or, for tf32x3, two such planes (2, D, 4H, H)."""
    r = r.contiguous()
    if plan.precision == "native":
        return r
    high = _round_tf32(r)
    if plan.precision == "tf32":
        return high
    low = torch.where(r.isfinite(), r - high, torch.zeros_like(r))
    return torch.stack((high, _round_tf32(low)))


def options(kernel, plan, waits, constants):
    """Compiler and launch options of a kernel of ``plan``; programs that wait must all run at the same time.

    maxnreg: a multiprocessor runs one such program, and all registers are its own. Left to itself the assembler likes
    to stop at 128 of a thread, for two programs, and then waits for each load before it issues the next.
    """
    gluon = not INTERPRET and kernel.is_gluon()
    num_warps = plan.num_warps
    if gluon and kernel is forward_gluon and not constants["MARKED"]:       # marks take the registers for more
        num_warps = plan.forward_warps
    chosen = dict(num_warps=num_warps, enable_fp_fusion=True, maxnreg=min(65536 // (32 * num_warps), 255))
    if gluon:
        chosen["num_ctas"] = plan.programs
    if waits:
        chosen["launch_cooperative_grid"] = True
    return chosen


def launch_kernel(kernel, plan, grid, *args, waits, **constants):
    """Run ``kernel`` over ``grid``; ``waits`` tells whether its programs wait for each other."""
    if INTERPRET:
        if waits and plan.programs > 1 and not interleaved:
            raise RuntimeError(f"the interpreter would wait for ever: {plan.programs} programs exchange h")
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, H=plan.hidden_size, DIRECTIONS=plan.directions, **constants,
                     **({} if INTERPRET else options(kernel, plan, waits, constants)))


def marks(T, B, D, lengths, reset, device):
    """What the kernels do with each row at each time, (D, T, B) uint8, for sequences that end early or begin anew.

    lengths (B,): the first so many times of a row are live; the state stays over the others, whose y is zero. reset
    (T, B) bool: time t begins from a zero state, in the reverse direction the time before t, which ends the same piece.
    Either may be None. In the order in which a direction takes the times, LIVE: the step counts; FRESH: it begins from
    a zero state; START: live, and the one before was not; END: live, and the next is not; BEFORE: not live, and the
    next is; CUT: the next is fresh.
    """
    time = torch.arange(T, device=device)[:, None]
    live = torch.ones(T, B, dtype=torch.bool, device=device) if lengths is None else time < lengths
    fresh = torch.zeros_like(live) if reset is None else reset
    found = []
    for d in range(D):
        begins = fresh if d == 0 else torch.cat([fresh[1:] & live[1:], torch.zeros_like(fresh[:1])])
        step = lambda t, d=d: t.flip(0) if d else t
        now, begins = step(live), step(begins & live)
        no = torch.zeros_like(now[:1])
        later = lambda t, no=no: torch.cat([no, t[:-1]])
        earlier = lambda t, no=no: torch.cat([t[1:], no])
        bits = ((cell.LIVE, now), (cell.FRESH, begins), (cell.START, now & later(~now)),
                (cell.END, now & earlier(~now)), (cell.BEFORE, ~now & earlier(now)), (cell.CUT, earlier(begins)))
        found.append(step(sum(bit.value * where.to(torch.uint8) for bit, where in bits)))
    return torch.stack(found)


def unmark(marks):
    """The lengths and resets of ``marks``, as far as they count."""
    return _has(marks[0], cell.LIVE).sum((0, 2)), _has(marks[0], cell.FRESH)[..., 0]


def _has(marks, bit):
    """Where ``marks`` have a bit, with a last dimension for units."""
    return (marks & bit.value).bool().unsqueeze(-1)


def _loop_constants(plan, marks):
    if plan.gluon:
        return dict(BLOCK_H=plan.block_h, BLOCK_B=plan.block_b, HELD=plan.register_bytes, MARKED=marks is not None,
                    PRECISION=plan.precision)
    constants = dict(CHUNKS=plan.chunks, BLOCK_B=plan.block_b, PRECISION=plan.precision, INTERPRET=INTERPRET,
                     MARKED=marks is not None)
    if plan.schedule != "resident":
        constants.update(BLOCK_H=plan.block_h, HELD=plan.held, BLOCK_K=plan.block_k)
    return constants


def _counters(plan, like):
    return torch.zeros(plan.directions * plan.groups * 32, dtype=torch.int32, device=like.device)


def _span(d, first, steps, T):
    """Times [lo, hi) of the steps that direction ``d`` takes as its ``first`` and following."""
    return (first, first + steps) if d == 0 else (T - first - steps, T - first)


def _rows(x, lo, hi):
    return x[lo:hi].reshape(-1, x.shape[-1])


def forward(x, w, r, b, h0, c0, marks, plan, save, run=None):
    """The layer over all steps. See ``triton_lstm.lstm``; x (T, B, I), w (D, 4H, I), r (D, 4H, H), b (D, 4H) or None,
    marks (D, T, B) or None.

    Returns y (T, B, D H), h_n and c_n (D, B, H), and what backward needs of c (-, D, B, H) fp32, empty without
    ``save``. ``run`` stands in for ``launch_kernel``, to compile or emulate instead.
    """
    run = run or launch_kernel
    T, B, _ = x.shape
    D, H = plan.directions, plan.hidden_size
    y = x.new_empty(T, B, D * H)
    c = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    kept = c.new_empty(max(-(-T // plan.keep_every), 1) - 1 if save else 0, D, B, H)
    if T == 0 or B == 0:
        return y, h0.clone(), c0.clone(), kept
    r = prepare_r(r, plan)
    h = h0.transpose(0, 1).reshape(B, D * H).contiguous()      # of H = 1, reshape alone makes a transposed view
    keep_every = plan.keep_every if save else T
    steps = plan.forward_steps(T, x.element_size())
    buffer = x.new_empty(D * steps * B * 4 * H)
    through_l2 = plan.schedule in ("grid", "streamed")
    rounded = x.new_empty(2, B, D * H) if through_l2 and plan.precision == "tf32" else h
    for first in range(0, T, steps):
        S = min(steps, T - first)
        a = buffer[:D * S * B * 4 * H].view(D, S * B, 4 * H)
        with matmul_precision(plan):
            for d in range(D):
                _input_product(x, w, b, d, _span(d, first, S, T), a[d])
        if first:
            h = torch.cat([y[first - 1, :, :H], y[T - first, :, H:]], 1) if D == 2 else y[first - 1]
            if marks is not None and D == 2:
                h[:, H:] = torch.where(_has(marks[1, T - first], cell.LIVE), h[:, H:], h0[1])   # or has yet to begin
        if through_l2 and plan.precision == "tf32":
            h = _round_tf32(h)
        head, shape = (a, r, h, c, y, kept, kept if marks is None else marks), (T, S, B, first, keep_every)
        constants = _loop_constants(plan, marks)
        if plan.gluon or plan.schedule == "resident":
            run(forward_gluon if plan.gluon else forward_resident, plan, (plan.groups, D), *head, *shape, waits=False,
                **constants)
        else:
            run(forward_grid, plan, (plan.programs, plan.groups, D), *head, rounded, _counters(plan, c), *shape,
                plan.tiles, waits=True, **constants)
    last = y[T - 1, :, :H]
    if marks is not None:
        live = _has(marks[0], cell.LIVE)
        ends = (live.sum(0) - 1).clamp(min=0)
        last = y[:, :, :H].gather(0, ends.expand(1, B, H))[0]
    # not stack: inside an operator it returns a view, which the caller could not detach_() or edit in place
    h_n = torch.cat([last[None], y[:1, :, H:]] if D == 2 else [last[None]])
    if marks is not None:
        h_n = torch.where(live.any(0), h_n, h0)
    return y, h_n, c.to(x.dtype), kept


def _input_product(x, w, b, d, span, out):
    rows = _rows(x, *span)
    if b is None:
        torch.mm(rows, w[d].t(), out=out)
    else:
        torch.addmm(b[d], rows, w[d].t(), out=out)


def _previous(y, h0, marks, d, span, H):
    """h before the steps at times ``span``: (rows of the chunk, matrix) pairs. The first step's h is h0."""
    (lo, hi), (T, B, _) = span, y.shape
    columns = y.view(T * B, -1)[:, d * H:(d + 1) * H]
    if d == 0 and lo == 0:
        pairs = [(slice(0, B), h0[d]), (slice(B, hi * B), columns[:(hi - 1) * B])]
    elif d == 1 and hi == T:
        last = (hi - lo - 1) * B
        pairs = [(slice(0, last), columns[(lo + 1) * B:]), (slice(last, last + B), h0[d])]
    else:
        shift = -B if d == 0 else B
        pairs = [(slice(0, (hi - lo) * B), columns[lo * B + shift:hi * B + shift])]
    pairs = [(rows, matrix) for rows, matrix in pairs if matrix.shape[0]]
    if marks is None:
        return pairs
    h, of = torch.cat([matrix for _, matrix in pairs]).view(hi - lo, B, H), marks[d, lo:hi]
    h = torch.where(_has(of, cell.START), h0[d], h).masked_fill(_has(of, cell.FRESH), 0)
    return [(slice(0, (hi - lo) * B), h.view(-1, H))]


def _add_product(total, a, b):
    """total += a^T b, accumulated in fp32 whatever the operands' type."""
    if a.dtype == torch.float32:
        total.addmm_(a.t(), b)
    elif a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        total += torch.mm(a.t(), b, out_dtype=torch.float32)
    else:
        total.addmm_(a.t().float(), b.float())


def backward(dy, dh_n, dc_n, x, w, r, b, h0, c0, marks, y, kept, plan, needs, run=None):
    """Gradients of ``forward``: (dx, dw, dr, db, dh0, dc0), None where ``needs`` says False.

    dy, dh_n and dc_n may be None. Goes over chunks of ``plan.keep_every`` steps from the last: recomputes the gates by
    products over the whole chunk, turns them into coefficients, then runs the reverse time loop.
    """
    run = run or launch_kernel
    T, B, I = x.shape
    D, H, K = plan.directions, plan.hidden_size, plan.keep_every
    state = lambda g: (torch.zeros(D, B, H, device=x.device) if g is None else
                       g.to(torch.float32, copy=True, memory_format=torch.contiguous_format))
    dh, dc = state(dh_n), state(dc_n)
    total = lambda need, *shape: torch.zeros(shape, device=x.device) if need else None
    dw, dr, db = total(needs[1], D, 4 * H, I), total(needs[2], D, 4 * H, H), total(needs[3], D, 4 * H)
    dx = (x.new_zeros if D == 2 else x.new_empty)(T, B, I) if needs[0] else None
    if T and B:
        prepared, c0, h0 = prepare_r(r, plan), c0.float().contiguous(), h0.contiguous()
        has_dy = dy is not None
        dy_unit = D * H if has_dy and all(n % (D * H) == 0 for n in dy.stride()[:2]) else 1
        strides = [n // dy_unit for n in dy.stride()[:2]] + [dy.stride(2)] if has_dy else [0, 0, 1]
        chunk = min(K, T) * D * B * H
        a_buffer, coef = x.new_empty(4 * chunk), dh.new_empty(6 * chunk)
        if plan.schedule in ("grid", "streamed"):
            share = dh.new_empty(2 * D * plan.groups * plan.tiles * plan.programs ** 2 * plan.block_b * plan.block_h)
        for first in reversed(range(0, T, K)):
            S = min(K, T - first)
            a = a_buffer[:D * S * B * 4 * H].view(D, S * B, 4 * H)
            spans = [_span(d, first, S, T) for d in range(D)]
            with matmul_precision(plan):
                for d in range(D):
                    _input_product(x, w, b, d, spans[d], a[d])
                    for rows, h in _previous(y, h0, marks, d, spans[d], H):
                        a[d, rows].addmm_(h, r[d].t())
            marks_or_none = kept if marks is None else marks
            run(coefficients, plan, (triton.cdiv(B * H, 256), D), a, c0, kept, coef, marks_or_none, T, S, B, first, K,
                waits=False, MARKED=marks is not None, BLOCK=256)
            # from here on a holds da
            head = (dy if has_dy else a, coef, prepared, a, dh, dc, marks_or_none)
            constants = dict(HAS_DY=has_dy, DY_UNIT=dy_unit, **_loop_constants(plan, marks))
            if plan.gluon or plan.schedule == "resident":
                run(backward_gluon if plan.gluon else backward_resident, plan, (plan.groups, D), *head,
                    T, S, B, first, *strides, waits=False, **constants)
            else:
                run(backward_grid, plan, (plan.programs, plan.groups, D), *head, share, _counters(plan, dc),
                    T, S, B, first, plan.tiles, *strides, waits=True, PROGRAMS=plan.programs, **constants)
            with matmul_precision(plan):
                for d in range(D):
                    if dw is not None:
                        rows = _rows(x, *spans[d])
                        if marks is not None:           # da is zero past a row's end, but x may be anything there
                            rows = rows.masked_fill(~_has(marks[d, slice(*spans[d])], cell.LIVE).view(-1, 1), 0)
                        _add_product(dw[d], a[d], rows)
                    if dr is not None:
                        for rows, h in _previous(y, h0, marks, d, spans[d], H):
                            _add_product(dr[d], a[d, rows], h)
                    if db is not None:
                        db[d] += a[d].sum(0, dtype=torch.float32)
                    if dx is not None:
                        out = dx[spans[d][0]:spans[d][1]].view(S * B, I)
                        out.addmm_(a[d], w[d]) if D == 2 else torch.mm(a[d], w[d], out=out)
    cast = lambda g, need: g.to(x.dtype) if need else None
    return dx, cast(dw, needs[1]), cast(dr, needs[2]), cast(db, needs[3]), cast(dh, needs[4]), cast(dc, needs[5])
