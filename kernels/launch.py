"""Runs the kernels over a sequence: input products before the time loop, weight gradients after it."""
import contextlib
import itertools

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from . import cell, waiting
from .backward import backward_grid, backward_resident, coefficients
from .forward import forward_grid, forward_resident
from .precision import products_in_tf32

INTERPRET = isinstance(forward_resident, InterpretedFunction)
if not INTERPRET:       # which knows no Gluon
    from .gluon_backward import backward_gluon
    from .gluon_forward import forward_gluon
    from .gluon_grid import forward_grid_gluon
    from .gluon_split import forward_split_gluon
    from .gluon_split_backward import backward_split_gluon
# Triton's interpreter runs a launch's programs one after the other, so one that waits for another waits for ever.
# Tests that interleave them set this.
interleaved = False


def matmul_precision(plan):
    """cuBLAS products as the plan's."""
    return products_in(plan.precision)


def products_in(precision):
    """cuBLAS products in TF32 where a plan of ``precision`` has them: torch has one switch for nn.LSTM and another for
    matmul."""
    return contextlib.nullcontext() if INTERPRET or precision == "native" else products_in_tf32(precision == "tf32")


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
    if gluon and plan.schedule == "cluster":
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
    if plan.wgmma or plan.split:
        constants = dict(CHUNKS=plan.chunks, BLOCK_H=plan.block_h, OWNERS=plan.owners, MARKED=marks is not None,
                         PRECISION=plan.precision)
        return {**constants, **(dict(BLOCK_B=plan.block_b) if plan.wgmma else dict(EACH=plan.held // plan.num_warps))}
    if plan.gluon:
        return dict(BLOCK_H=plan.block_h, BLOCK_B=plan.block_b, HELD=plan.register_bytes, MARKED=marks is not None,
                    PRECISION=plan.precision)
    constants = dict(CHUNKS=plan.chunks, BLOCK_B=plan.block_b, PRECISION=plan.precision, INTERPRET=INTERPRET,
                     MARKED=marks is not None)
    if plan.schedule != "resident":
        constants.update(BLOCK_H=plan.block_h, OWNERS=plan.owners, HELD=plan.held, BLOCK_K=plan.block_k)
    return constants


def _backward_constants(plan, marks):
    """Those of the backward loop, and which programs send to which."""
    if not plan.split:
        constants = _loop_constants(plan, marks)
        return constants if plan.gluon or plan.schedule == "resident" else {**constants, "PROGRAMS": plan.programs}
    return dict(CHUNKS=plan.targets, BLOCK_H=plan.block_h, OWNERS=plan.owners, PROGRAMS=plan.programs,
                MARKED=marks is not None, PRECISION=plan.precision)


def _zoneout_constants(zoneout):
    """``zoneout`` of ``forward`` as ``cell.zoneout`` takes it. Nothing for None: the kernels stay what they are."""
    if zoneout is None:
        return {}
    seed, *rates = zoneout
    if seed is not None:
        rates = [round(rate * 2 ** 24) for rate in rates]
    return dict(ZONEOUT="expected" if seed is None else "drawn", seed_ptr=seed, rate_h=rates[0], rate_c=rates[1])


def clear(sent, plan):
    """Fill a memory for h (steps, ..., rows, units): nothing has been sent yet, but zeros before the first step."""
    sent.view(torch.int16 if sent.element_size() == 2 else torch.int32).fill_(-1)
    sent[0] = 0
    if plan.owners > plan.programs:
        sent[..., plan.programs * plan.block_h:] = 0        # where no program sends


def _clear_after(h, sent, marks, first, T, plan):
    """``clear``, with h (D, B, H) before the first step as the programs would have sent it."""
    if plan.precision == "tf32":
        h = _round_tf32(h)
    if marks is not None:
        now = torch.stack([marks[d, _span(d, first, 1, T)[0]] for d in range(plan.directions)])
        h = h.masked_fill(_has(now, cell.FRESH), 0)
    clear(sent, plan)
    # "nothing yet" is a NaN too, which h may not be
    sent[0, :, :h.shape[1], :h.shape[2]] = torch.where(h == h, h, torch.nan)


def _span(d, first, steps, T):
    """Times [lo, hi) of the steps that direction ``d`` takes as its ``first`` and following."""
    return (first, first + steps) if d == 0 else (T - first - steps, T - first)


class _Rows:
    """Where the rows of each time lie in x and y: B a time, or packed, ``sizes`` (T,) on the CPU a time.

    ``offsets`` is what the kernels read of it: None, or how many rows come before each time and before the end. Packed,
    ``begins`` (2, B) are the rows with which each direction begins a sequence: its first and its last.
    """

    def __init__(self, x, B, sizes):
        self.T, self.B, self.offsets = len(x) if sizes is None else len(sizes), B, None
        if sizes is None:
            return
        self._sizes = [*sizes.tolist(), 0]
        self._before = [0, *itertools.accumulate(self._sizes[:-1])]
        if self._before[-1] != len(x) or self._sizes[0] != B or self._sizes != sorted(self._sizes, reverse=True):
            raise ValueError(f"batch_sizes must fall from the {B} rows of the state and add up to the {len(x)} of x")
        last = [self._before[t] + n for t in reversed(range(self.T)) for n in range(self._sizes[t + 1], self._sizes[t])]
        on_device = torch.tensor([*self._before, *range(B), *last], device="cpu").to(x.device, non_blocking=True)
        self.offsets, self.begins = on_device[:self.T + 1], on_device[self.T + 1:].view(2, B)

    def count(self, lo, hi):
        """How many rows times [lo, hi) have."""
        return (hi - lo) * self.B if self.offsets is None else self._before[hi] - self._before[lo]

    def of(self, x, lo, hi):
        """The rows of x or y at times [lo, hi), as a matrix."""
        return (x[lo:hi] if self.offsets is None else x[self._before[lo]:self._before[hi]]).reshape(-1, x.shape[-1])

    def chunk(self, buffer, spans):
        """What a chunk uses of ``buffer`` (rows, -): a matrix for each direction, which takes the times of its span."""
        counts = [self.count(*span) for span in spans]
        return buffer[:sum(counts)].split(counts)

    def most(self, D, steps):
        """The most rows that chunks of ``steps`` steps have, all directions together."""
        if self.offsets is None:
            return D * steps * self.B
        return max(sum(self.count(*_span(d, first, min(steps, self.T - first), self.T)) for d in range(D))
                   for first in range(0, self.T, steps))

    def packed_previous(self, columns, h0, d, lo, hi):
        """Packed, h of direction ``d`` before its steps at times [lo, hi): from all of its h, and from h0 (B, H)."""
        start, count = self.count(0, lo), self.count(lo, hi)
        sizes = self.offsets.diff(prepend=self.offsets[:1])         # of the time before each, then of the last
        away = sizes[lo + 1:hi + 1] if d else -sizes[lo:hi]
        index = torch.arange(start, start + count, device=columns.device)
        index += away.repeat_interleave(sizes[lo + 1:hi + 1], output_size=count)
        h = columns.index_select(0, index.clamp_(max=len(columns) - 1))
        new = slice(self._sizes[hi], self._sizes[lo]) if d else slice(0, 0 if lo else self.B)
        return h.index_copy_(0, self.begins[d, new] - start, h0[new])


def finish(chunks):
    """What the generator ``chunks`` returns, after all that it has left to do. An error of CUDA says which kernel gave
    up, if one did."""
    with waiting.explained():
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                return end.value


def forward(*args, **kwargs):
    """All of ``forward_chunks``, whose arguments it takes: (y, h_n, c_n, kept)."""
    return finish(forward_chunks(*args, **kwargs))


def forward_chunks(x, w, r, b, h0, c0, marks, plan, save, sizes=None, zoneout=None, run=None, steps=None):
    """The layer over all steps, as a generator. See ``triton_lstm.lstm``; x (T, B, I), w (D, 4H, I), r (D, 4H, H),
    b (D, 4H) or None, marks (D, T, B) or None. With ``sizes`` (T,) on the CPU x is packed, (rows, I); marks then tell
    the same. zoneout: (seed, rate_h, rate_c) or None, the seed an int64 tensor of one element, or None for the
    expectation.

    Allocates all that outlives a chunk and yields y, to be filled; then runs a chunk of ``steps`` steps (None: as many
    as the plan has at a time) before each further yield. x need not be there before the chunk that reads it.

    Returns y (T, B, D H) or (rows, D H), h_n and c_n (D, B, H), and what backward needs of c (-, D, B, H) fp32, empty
    without ``save``. ``run`` stands in for ``launch_kernel``, to compile or emulate instead.
    """
    run = run or launch_kernel
    B, D, H = h0.shape[1], plan.directions, plan.hidden_size
    rows = _Rows(x, B, sizes)
    T = rows.T
    y = x.new_empty(*x.shape[:-1], D * H)
    c = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    kept = c.new_empty(max(-(-T // plan.keep_every), 1) - 1 if save else 0, D, B, H)
    if T == 0 or B == 0:
        yield y
        return y, h0.clone(), c0.clone(), kept
    more = _zoneout_constants(zoneout)
    r = prepare_r(r, plan)
    h = h0.transpose(0, 1).reshape(B, D * H).contiguous()      # of H = 1, reshape alone makes a transposed view
    keep_every = plan.keep_every if save else T
    if plan.multiplies_input(x.shape[-1]):
        steps, buffer = steps or T, x.contiguous()
        more = dict(INPUTS=x.shape[-1], w_ptr=prepare_r(w, plan), b_ptr=None if b is None else b.contiguous())
    else:
        steps = steps or plan.forward_steps(T, x.element_size())
        buffer = x.new_empty(rows.most(D, min(steps, T)), 4 * H)
    through_l2 = plan.schedule in ("grid", "streamed")
    if through_l2:
        watched = {} if INTERPRET else waiting.arguments(x.device)
        sent = x.new_empty(min(steps, T), D, plan.groups * plan.tiles * plan.block_b, plan.owners * plan.block_h)
    yield y
    for first in range(0, T, steps):
        S = min(steps, T - first)
        spans = [_span(d, first, S, T) for d in range(D)]
        with matmul_precision(plan):
            for d, a in enumerate([] if "INPUTS" in more else rows.chunk(buffer, spans)):
                _input_product(rows.of(x, *spans[d]), w, b, d, a)
        if first:
            h = _state(y, h0, marks, rows, first)
        head = (buffer, r, h, c, y, kept, kept if marks is None else marks, rows.offsets)
        shape, constants = (T, S, B, first, keep_every), {**_loop_constants(plan, marks), **more}
        if not through_l2:
            run(forward_gluon if plan.gluon else forward_resident, plan, (plan.groups, D), *head, *shape, waits=False,
                **constants)
        else:
            if zoneout is not None:
                constants["h0_ptr"] = h0.contiguous()
            _clear_after(h.view(B, D, H).transpose(0, 1), sent[:S], marks, first, T, plan)
            kernel = forward_grid_gluon if plan.wgmma else forward_split_gluon if plan.split else forward_grid
            run(kernel, plan, (plan.programs, plan.groups, D), *head, sent, *shape, plan.tiles, waits=True, **constants,
                **watched)
        yield
    if sizes is not None:
        last = y[:, :H].index_select(0, rows.begins[1])
    elif marks is not None:
        live = _has(marks[0], cell.LIVE)
        ends = (live.sum(0) - 1).clamp(min=0)
        last = y[:, :, :H].gather(0, ends.expand(1, B, H))[0]
    else:
        last = y[T - 1, :, :H]
    # not stack: inside an operator it returns a view, which the caller could not detach_() or edit in place
    h_n = torch.cat([last[None], rows.of(y, 0, 1)[None, :, H:]] if D == 2 else [last[None]])
    if sizes is None and marks is not None:
        h_n = torch.where(live.any(0), h_n, h0)
    return y, h_n, c.to(x.dtype), kept


def _state(y, h0, marks, rows, first):
    """h (B, D H) before the step that each direction takes as its ``first``, which is not 0."""
    H, states = h0.shape[-1], []
    for d in range(len(h0)):
        time = first - 1 if d == 0 else rows.T - first
        h = rows.of(y, time, time + 1)[:, d * H:(d + 1) * H]
        h = torch.cat([h, h0[d, len(h):]])
        if marks is not None and d == 1:
            h = torch.where(_has(marks[1, time], cell.LIVE), h, h0[1])      # or has yet to begin
        states.append(h)
    return torch.cat(states, 1)


def _input_product(rows, w, b, d, out):
    if b is None:
        torch.mm(rows, w[d].t(), out=out)
    else:
        torch.addmm(b[d], rows, w[d].t(), out=out)


def _previous(y, h0, marks, rows, d, span):
    """h before the steps at times ``span``: (rows of the chunk, matrix) pairs. The first step's h is h0."""
    (lo, hi), T, B, H = span, rows.T, rows.B, h0.shape[-1]
    columns = rows.of(y, 0, T)[:, d * H:(d + 1) * H]
    if rows.offsets is not None:
        return [(slice(None), rows.packed_previous(columns, h0[d], d, lo, hi))]
    if d == 0 and lo == 0:
        pairs = [(slice(0, B), h0[d]), (slice(B, hi * B), columns[:(hi - 1) * B])]
    elif d == 1 and hi == T:
        last = (hi - lo - 1) * B
        pairs = [(slice(0, last), columns[(lo + 1) * B:]), (slice(last, last + B), h0[d])]
    else:
        shift = -B if d == 0 else B
        pairs = [(slice(0, (hi - lo) * B), columns[lo * B + shift:hi * B + shift])]
    pairs = [(chosen, matrix) for chosen, matrix in pairs if matrix.shape[0]]
    if marks is None:
        return pairs
    h, of = torch.cat([matrix for _, matrix in pairs]).view(hi - lo, B, H), marks[d, lo:hi]
    h = torch.where(_has(of, cell.START), h0[d], h).masked_fill(_has(of, cell.FRESH), 0)
    return [(slice(None), h.view(-1, H))]


def _add_product(total, a, b):
    """total += a^T b, accumulated in fp32 whatever the operands' type."""
    if a.dtype == torch.float32:
        total.addmm_(a.t(), b)
    elif a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        total += torch.mm(a.t(), b, out_dtype=torch.float32)
    else:
        total.addmm_(a.t().float(), b.float())


def backward(*args, **kwargs):
    """All of ``backward_chunks``, whose arguments it takes: (dx, dw, dr, db, dh0, dc0)."""
    return finish(backward_chunks(*args, **kwargs))


def backward_chunks(dy, dh_n, dc_n, x, w, r, b, h0, c0, marks, y, kept, plan, needs, sizes=None, zoneout=None,
                    run=None):
    """Gradients of ``forward``, as a generator: (dx, dw, dr, db, dh0, dc0), None where ``needs`` says False.

    dy, dh_n and dc_n may be None. Goes over chunks of ``plan.keep_every`` steps from the last: recomputes the gates by
    products over the whole chunk, turns them into coefficients, then runs the reverse time loop.

    Allocates all that outlives a chunk and yields dx, to be filled; then runs a chunk before each further yield. dy
    need not be there before the chunk that reads it.
    """
    run, plan = run or launch_kernel, plan.backward
    B, D, H, K = h0.shape[1], plan.directions, plan.hidden_size, plan.keep_every
    rows = _Rows(x, B, sizes)
    T = rows.T
    state = lambda g: (torch.zeros(D, B, H, device=x.device) if g is None else
                       g.to(torch.float32, copy=True, memory_format=torch.contiguous_format))
    dh, dc = state(dh_n), state(dc_n)
    total = lambda need, *shape: torch.zeros(shape, device=x.device) if need else None
    dw, dr, db = total(needs[1], *w.shape), total(needs[2], D, 4 * H, H), total(needs[3], D, 4 * H)
    dx = (x.new_zeros if D == 2 else x.new_empty)(x.shape) if needs[0] else None
    if T and B:
        prepared, c0, h0 = prepare_r(r, plan), c0.float().contiguous(), h0.contiguous()
        has_dy = dy is not None
        # packed, the first two are one
        strides = [dy.stride(0), dy.stride(-2), dy.stride(-1)] if has_dy else [0, 0, 1]
        dy_unit = D * H if has_dy and all(n % (D * H) == 0 for n in strides[:2]) else 1
        strides[:2] = (n // dy_unit for n in strides[:2])
        most = rows.most(D, min(K, T))
        count = 6 if zoneout is None else 8
        buffer, coef = x.new_empty(most, 4 * H), dh.new_empty(most, count * H)
        if plan.schedule in ("grid", "streamed"):
            watched = {} if INTERPRET else waiting.arguments(x.device)
            share = dh.new_zeros(2 * D * plan.groups * plan.tiles * plan.owners * plan.programs * plan.block_b
                                 * plan.block_h)
    yield dx
    if T and B:
        for first in reversed(range(0, T, K)):
            S = min(K, T - first)
            spans = [_span(d, first, S, T) for d in range(D)]
            a = rows.chunk(buffer, spans)
            with matmul_precision(plan):
                for d in range(D):
                    _input_product(rows.of(x, *spans[d]), w, b, d, a[d])
                    for chosen, h in _previous(y, h0, marks, rows, d, spans[d]):
                        a[d][chosen].addmm_(h, r[d].t())
            marks_or_none = kept if marks is None else marks
            run(coefficients, plan, (triton.cdiv(B * H, 256), D), buffer, c0, kept, coef, marks_or_none, rows.offsets,
                T, S, B, first, K, waits=False, MARKED=marks is not None, BLOCK=256,
                **_zoneout_constants(zoneout))
            # from here on a and its buffer hold da
            head = (dy if has_dy else buffer, coef, prepared, buffer, dh, dc, marks_or_none, rows.offsets)
            constants = dict(HAS_DY=has_dy, DY_UNIT=dy_unit, **_backward_constants(plan, marks))
            if zoneout is not None:
                constants["COUNT"] = count
            if plan.schedule in ("resident", "cluster"):
                run(backward_gluon if plan.gluon else backward_resident, plan, (plan.groups, D), *head,
                    T, S, B, first, *strides, waits=False, **constants)
            else:
                run(backward_split_gluon if plan.split else backward_grid, plan, (plan.programs, plan.groups, D), *head,
                    share, T, S, B, first, plan.tiles, *strides, waits=True, **constants, **watched)
            with matmul_precision(plan):
                for d in range(D):
                    if dw is not None:
                        of_x = rows.of(x, *spans[d])
                        if marks is not None and sizes is None:     # past a row's end da is zero, but x may be anything
                            of_x = of_x.masked_fill(~_has(marks[d, slice(*spans[d])], cell.LIVE).view(-1, 1), 0)
                        _add_product(dw[d], a[d], of_x)
                    if dr is not None:
                        for chosen, h in _previous(y, h0, marks, rows, d, spans[d]):
                            _add_product(dr[d], a[d][chosen], h)
                    if db is not None:
                        db[d] += a[d].sum(0, dtype=torch.float32)
                    if dx is not None:
                        out = rows.of(dx, *spans[d])
                        out.addmm_(a[d], w[d]) if D == 2 else torch.mm(a[d], w[d], out=out)
            yield
    cast = lambda g, need: g.to(x.dtype) if need else None
    return dx, cast(dw, needs[1]), cast(dr, needs[2]), cast(db, needs[3]), cast(dh, needs[4]), cast(dc, needs[5])
