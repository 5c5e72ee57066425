"""A layer over time: input products before each time loop, the loops themselves, and weight gradients after them."""
import torch

from . import exchange, launch, waiting
from .cell import zoneout_arguments
from .precision import INTERPRET, products_in, rounded_to_tf32
from .rows import LIVE, Rows, has, times_of


def finish(chunks):
    """Run the generator ``chunks`` to its end and return what it returns. An error of CUDA then says which kernel has
    given up, if one has."""
    with waiting.explained():
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                return end.value


def step_flags(T, B, directions, lengths, sizes, reset, device, launcher=None):
    """``rows.step_flags`` by one launch. Without ``lengths``, ``sizes`` (T,) may say how many rows each time has.
    launcher: as for ``forward_chunks``."""
    flags = torch.empty(directions, T, B, dtype=torch.uint8, device=device)
    if T and B:
        strides = (0, 0) if reset is None else reset.stride()
        run = launcher or launch.launch_kernel
        run(launch.FLAGS, launch.NO_PLAN[directions], (-(-T * B // 1024), 1), flags, lengths, sizes, reset, T, B,
            *strides, waits=False, BLOCK=1024)
    return flags


def forward(*args, **kwargs):
    """All of ``forward_chunks``, whose arguments it takes: (y, h_n, c_n, kept, gates)."""
    return finish(forward_chunks(*args, **kwargs))


def forward_chunks(x, w, r, b, h0, c0, flags, plan, save, batch_sizes=None, zoneout=None, launcher=None, steps=None,
                   keep_gates=False, all_live=False, zero_state=False):
    """The layer over all steps, as a generator that runs one chunk of steps at a time.

    x            (T, B, I), or packed (rows, I)
    w, r         (D, 4H, I) and (D, 4H, H), or a list of such matrices of each direction
    b            (D, 4H) or None, or a list
    h0, c0       (D, B, H)
    flags        step flags (D, T, B) or None, see ``rows``
    save         whether backward will follow
    batch_sizes  (T,) on the CPU where x is packed, else None; flags then say the same
    zoneout      (seed, rate_h, rate_c) or None; the seed is an int64 tensor of one element, or None for the expectation
    launcher     stands in for ``launch.launch_kernel``, to compile or emulate instead
    steps        of a chunk; None: as many as the plan takes at a time
    keep_gates   with ``save``: whether backward gets the gates' pre-activations and every c, and recomputes nothing
    all_live     whether every step of ``flags`` is known to be live, as where only resets made them
    zero_state   whether h0 and c0 are known to be zero

    The first ``next`` allocates all that outlives a chunk and yields y, not yet written. Each further one runs a chunk.
    x is read only in the chunk that needs it.

    Returns y (T, B, D H) or packed (rows, D H), h_n and c_n (D, B, H), and what backward needs beside y: ``kept``
    (-, D, B, H) fp32, c before every ``plan.keep_every``-th step except the first, or with ``keep_gates`` before every
    step; and ``gates`` (rows, 4H) of x's type, the pre-activations of all steps and directions, chunk by chunk. Both
    are empty without ``save``, gates without ``keep_gates``.
    """
    run = launcher or launch.launch_kernel
    B, D, H = h0.shape[1], plan.directions, plan.hidden_size
    rows = Rows(x, B, batch_sizes)
    T = rows.T
    y = x.new_empty(*x.shape[:-1], D * H)
    c = x.new_zeros(D, B, H, dtype=torch.float32) if zero_state else c0.to(torch.float32, copy=True,
                                                                           memory_format=torch.contiguous_format)
    keep_gates = keep_gates and save
    keep_every = 1 if keep_gates else plan.keep_every if save else max(T, 1)
    kept = c.new_empty(T if keep_gates else max(-(-T // keep_every), 1) - 1, D, B, H)
    gates = x.new_empty(D * rows.count(0, T) if keep_gates else 0, 4 * H)
    if T == 0 or B == 0:
        yield y
        return y, h0.clone(), c0.clone(), kept, gates
    loop, more = launch.LOOPS[plan.kind, "forward"], zoneout_arguments(zoneout)
    r = _as_read(r, plan)
    # of H = 1, reshape alone makes a transposed view
    h = (h0 if D == 1 else h0.transpose(0, 1).reshape(B, D * H)).contiguous()       # (B, D H) in memory
    if keep_gates:
        # of two directions, a chunk has to have the steps of one of backward's
        steps = plan.keep_every if D == 2 else steps or plan.forward_steps(T, x.element_size())
        more["KEEP_GATES"] = True
    elif plan.multiplies_input(x.shape[-1]):
        steps, buffer = steps or T, x.contiguous()
        more = dict(INPUTS=x.shape[-1], w_ptr=_stacked(w), b_ptr=None if b is None else _stacked(b))
    else:
        steps = steps or plan.forward_steps(T, x.element_size())
        buffer = x.new_empty(rows.most(D, min(steps, T)), 4 * H)
    if plan.exchanges:
        slots = exchange.new_slots(x, min(steps, T), plan)
        if zoneout is not None:
            more["h0_ptr"] = h0.contiguous()
        if not INTERPRET:
            more.update(waiting.arguments(x.device))
    grid, tiles = launch.grid_of(plan), (plan.tiles,) if plan.exchanges else ()
    constants = {**loop.constants(plan), **more}
    yield y
    for first in range(0, T, steps):
        S = min(steps, T - first)
        if "INPUTS" not in more:
            spans = [times_of(d, first, S, T) for d in range(D)]
            if keep_gates:
                buffer = _gates_of(gates, rows, spans, first)
            with products_in(plan.precision):
                for d, a in enumerate(rows.split(buffer, spans)):
                    _input_product(rows.of(x, *spans[d]), w, b, d, a)
        if first:
            h = _state(y, h0, flags, rows, first)
        sent = ()
        if plan.exchanges:
            if zero_state and first == 0:
                exchange.fill(slots[:S], plan)
            else:
                exchange.fill_from(h.view(B, D, H).transpose(0, 1), slots[:S], flags, first, T, plan)
            sent = slots,
        run(loop.kernel, plan, grid, buffer, r, h, c, y, kept, *sent, T, S, B, first, keep_every, *tiles,
            waits=plan.exchanges, flags_ptr=flags, offsets_ptr=rows.offsets, **constants)
        yield
    if batch_sizes is not None:
        last = y[:, :H].index_select(0, rows.last).unsqueeze(0)
    elif flags is not None and not all_live:
        live = has(flags[0], LIVE)
        ends = (live.sum(0) - 1).clamp(min=0)
        last = y[:, :, :H].gather(0, ends.expand(1, B, H))
    else:
        last = y[T - 1:, :, :H] if D == 2 else y[T - 1:]
    # not stack: inside an operator it returns a view, which the caller could not detach_() or edit in place
    h_n = torch.cat([last, rows.of(y, 0, 1)[None, :, H:]]) if D == 2 else last.clone(
        memory_format=torch.contiguous_format)
    if batch_sizes is None and flags is not None and not all_live:
        h_n = torch.where(live.any(0), h_n, h0)
    return y, h_n, c if x.dtype == torch.float32 else c.to(x.dtype), kept, gates


def _rows_before(rows, D, first):
    """How many rows of x the directions have taken together before each takes its step ``first``."""
    return sum(rows.count(*times_of(d, 0, first, rows.T)) for d in range(D))


def _gates_of(gates, rows, spans, first):
    """The part of ``gates`` that belongs to the chunk of step ``first``, whose times are ``spans``."""
    start = _rows_before(rows, len(spans), first) if first else 0
    end = start + sum(rows.count(*span) for span in spans)
    return gates[start:end] if end - start < len(gates) else gates


def one_step(x, weights, h0, c0, shape, directions, precision, with_y=True, launcher=None):
    """One step (T = 1) of a stack of layers without gradients, by one launch a layer: (y, h_n, c_n).

    x          (..., I): a row for each row of the batch
    weights    (W (4H, I), R (4H, H), b_ih, b_hh) of each direction of each layer, in nn.LSTM's order. A bias is (4H,)
               or None; b_hh alone may be None too
    h0, c0     (layers D, B, H), or None for zeros
    shape      of h_n and c_n, which have so many elements
    with_y     whether y (..., D H) is wanted; otherwise it is None
    launcher   as for ``forward_chunks``
    """
    run, D, H = launcher or launch.launch_kernel, directions, shape[-1]
    B = x.shape[:-1].numel()
    if h0 is not None:
        h0, c0 = h0.contiguous(), c0.contiguous()
    h_n, c_n, y = x.new_empty(shape), x.new_empty(shape), None
    for first in range(0, len(weights), D):
        x, own = x.contiguous(), [None if t is None else t.contiguous() for of in weights[first:first + D] for t in of]
        y = x.new_empty(*x.shape[:-1], D * H) if with_y or first + D < len(weights) else None
        if B:
            step = launch.step_of(B, x.shape[-1], H, D, precision)
            with waiting.explained():       # an error may be that of an earlier kernel
                run(launch.STEP, step, step.grid(B), x, *own, *(None,) * (8 - len(own)), h0, c0, y, h_n, c_n, B, first,
                    waits=False, **step.constants)
        x = y
    return y, h_n, c_n


def _state(y, h0, flags, rows, first):
    """h (B, D H) before the step that each direction takes as its ``first``, which is not 0."""
    H, states = h0.shape[-1], []
    for d in range(len(h0)):
        time = first - 1 if d == 0 else rows.T - first
        h = rows.of(y, time, time + 1)[:, d * H:(d + 1) * H]
        h = torch.cat([h, h0[d, len(h):]])
        if flags is not None and d == 1:
            h = torch.where(has(flags[1, time], LIVE), h, h0[1])      # or has not begun yet
        states.append(h)
    return torch.cat(states, 1)


def _stacked(of_directions):
    """(D, ...) in the memory of one tensor, of which of one direction only the pointer counts."""
    if isinstance(of_directions, torch.Tensor):
        return of_directions.contiguous()
    return of_directions[0].contiguous() if len(of_directions) == 1 else torch.stack(of_directions)


def _as_read(r, plan):
    """R as the kernels read it. They round what they hold as they load it. What a streamed plan reads at every step is
    rounded once."""
    r = _stacked(r)
    return rounded_to_tf32(r) if plan.kind == "streamed" and plan.precision == "tf32" else r


def _input_product(rows, w, b, d, out):
    if b is None:
        torch.mm(rows, w[d].t(), out=out)
    else:
        torch.addmm(b[d], rows, w[d].t(), out=out)


def _previous(y, h0, rows, d, span, zero_state):
    """h before the steps at times ``span``, of padded rows without step flags: (rows of the chunk, matrix) pairs. The
    first step's h is h0. Where h0 is known to be zero it may be left out."""
    (lo, hi), T, B, H, first = span, rows.T, rows.B, h0.shape[-1], h0[d]
    columns = y.reshape(T * B, -1)[:, d * H:(d + 1) * H]
    if d == 0 and lo == 0:
        pairs = [(slice(0, B), first), (slice(B, hi * B), columns[:(hi - 1) * B])]
    elif d == 1 and hi == T:
        last = (hi - lo - 1) * B
        pairs = [(slice(0, last), columns[(lo + 1) * B:]), (slice(last, last + B), first)]
    else:
        shift = -B if d == 0 else B
        pairs = [(slice(0, (hi - lo) * B), columns[lo * B + shift:hi * B + shift])]
    return [pair for pair in pairs if len(pair[1]) and not (zero_state and pair[1] is first)]


def _add_product(total, a, b, begun):
    """Add a^T b, in fp32 whatever the operands' type, to ``total``, which has no value yet unless it has ``begun``."""
    options = {}
    if a.dtype != torch.float32:
        if a.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads():
            if begun:
                total += torch.mm(a.t(), b, out_dtype=torch.float32)
                return
            options = dict(out_dtype=torch.float32)
        else:
            a, b = a.float(), b.float()
    if begun:
        total.addmm_(a.t(), b)
    else:
        torch.mm(a.t(), b, out=total, **options)


def backward(*args, **kwargs):
    """All of ``backward_chunks``, whose arguments it takes: (dx, dw, dr, db, dh0, dc0)."""
    return finish(backward_chunks(*args, **kwargs))


def backward_chunks(dy, dh_n, dc_n, x, w, r, b, h0, c0, flags, y, kept, gates, plan, needs, batch_sizes=None,
                    zoneout=None, launcher=None, all_live=False, zero_state=False):
    """The gradients of ``forward``, as a generator that runs one chunk of ``plan.keep_every`` steps at a time, from the
    last: it recomputes the gates by products over the whole chunk, unless forward kept them, turns them into
    coefficients, unless the loop does so, then runs the time loop backwards.

    dy, dh_n, dc_n   gradients of y, h_n, c_n, or None
    y, kept, gates   what ``forward`` returned; gates may also be None
    needs            which of the six gradients are wanted; the others are None. Those of w, r and b are lists of D
                     tensors where w is a list, and then each has memory of its own
    all_live, zero_state    as for ``forward_chunks``

    The first ``next`` allocates all that outlives a chunk and yields dx, not yet written. Each further one runs a
    chunk. dy is read only in the chunk that needs it. Returns (dx, dw, dr, db, dh0, dc0).
    """
    run, plan = launcher or launch.launch_kernel, plan.backward
    loop = launch.LOOPS[plan.kind, "backward"]
    B, D, H, K = h0.shape[1], plan.directions, plan.hidden_size, plan.keep_every
    rows = Rows(x, B, batch_sizes)
    T = rows.T
    if dh_n is dc_n is None and not (needs[4] or needs[5]):
        dh, dc = x.new_zeros(2, D, B, H, dtype=torch.float32).unbind()
    else:
        dh, dc = (x.new_zeros(D, B, H, dtype=torch.float32) if g is None else
                  g.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for g in (dh_n, dc_n))
    # without steps or rows all is zero
    apart, empty = not isinstance(w, torch.Tensor), dh.new_empty if T and B else dh.new_zeros
    total = lambda need, *shape: (
        None if not need else [empty(shape) for _ in range(D)] if apart else empty(D, *shape))
    dw, dr, db = total(needs[1], 4 * H, x.shape[-1]), total(needs[2], 4 * H, H), total(needs[3], 4 * H)
    # of one chunk, the second direction adds to what the first has written
    adds = D == 2 and T > K
    dx = (x.new_zeros if adds else x.new_empty)(x.shape) if needs[0] else None
    if T and B:
        r_as_read, c0, h0 = _as_read(r, plan), c0.float().contiguous(), h0.contiguous()
        # packed, the first two are one
        strides = [0, 0, 1] if dy is None else [dy.stride(0), dy.stride(-2), dy.stride(-1)]
        dy_unit = D * H if dy is not None and all(n % (D * H) == 0 for n in strides[:2]) else 1
        strides[:2] = (n // dy_unit for n in strides[:2])
        most = rows.most(D, min(K, T))
        count = 6 if zoneout is None else 8
        keep_gates = gates is not None and len(gates) > 0
        derives, coef = plan.derives_coefficients and zoneout is None, None
        buffer = x.new_empty(most, 4 * H)
        if not derives:
            coef = dh.new_empty(most, count * H)
        elif not keep_gates:
            states = dh.new_empty(min(K, T), D, B, H)
        needs_previous = needs[2] or not keep_gates
        h_before = None if flags is None or not needs_previous else x.new_empty(most, H)
        shares, more = (), dict(dy_ptr=dy, DY_UNIT=dy_unit)
        if zoneout is not None:
            more["COUNT"] = count
        if plan.exchanges:
            shares = exchange.new_shares(dh, plan),
            if not INTERPRET:
                more.update(waiting.arguments(x.device))
        grid, tiles = launch.grid_of(plan), (plan.tiles,) if plan.exchanges else ()
        constants, of_coefficients = {**loop.constants(plan), **more}, zoneout_arguments(zoneout)
        # of kept gates each step has its own programs; a grid has 65535 of them at most
        steps, keep_every = (-(-K // 65535), 1) if keep_gates else (K, K)
    yield dx
    if T and B:
        for first in reversed(range(0, T, K)):
            S, begun = min(K, T - first), first + K < T
            spans = [times_of(d, first, S, T) for d in range(D)]
            a = rows.split(buffer, spans)
            of_x = [rows.of(x, *span) for span in spans]
            blocks = -(-B * H // 256)           # triton.cdiv takes the host longer than an allocation
            if not needs_previous:
                previous = []
            elif flags is None:
                previous = [_previous(y, h0, rows, d, spans[d], zero_state) for d in range(D)]
            else:
                run(launch.PREVIOUS, plan, (blocks * S, D), y, h0, h_before, T, S, B, first, blocks, waits=False,
                    flags_ptr=flags, offsets_ptr=rows.offsets, BLOCK=256)
                previous = [[(slice(None), part)] for part in rows.split(h_before, spans)]
            if keep_gates:
                of_gates = _gates_of(gates, rows, spans, first)
            else:
                of_gates = buffer
                with products_in(plan.precision):
                    for d in range(D):
                        _input_product(of_x[d], w, b, d, a[d])
                        for chosen, h in previous[d]:
                            a[d][chosen].addmm_(h, r[d].t())
            if not derives:
                run(launch.COEFFICIENTS, plan, (blocks, D, -(-S // steps)), of_gates, c0,
                    kept[1:] if keep_gates else kept, coef, T, S, B, first, steps, keep_every, waits=False,
                    flags_ptr=flags, offsets_ptr=rows.offsets, BLOCK=256, **of_coefficients)
            elif keep_gates:
                constants["kept_ptr"] = kept[first:]
            else:
                constants["kept_ptr"] = states
                run(launch.STATES, plan, (blocks, D), of_gates, c0, kept, states, T, S, B, first, K, waits=False,
                    flags_ptr=flags, offsets_ptr=rows.offsets, BLOCK=256)
            # from here on a and its buffer hold da
            run(loop.kernel, plan, grid, of_gates if derives else coef, r_as_read, buffer, dh, dc, *shares, T, S, B,
                first, *tiles, *strides, waits=plan.exchanges, flags_ptr=flags, offsets_ptr=rows.offsets, **constants)
            with products_in(plan.precision):
                for d in range(D):
                    if dw is not None:
                        if flags is not None and batch_sizes is None and not all_live:
                            # past a row's end da is zero, but x may be anything
                            of_x[d] = of_x[d].masked_fill(~has(flags[d, slice(*spans[d])], LIVE).view(-1, 1), 0)
                        _add_product(dw[d], a[d], of_x[d], begun)
                    if dr is not None:
                        for n, (chosen, h) in enumerate(previous[d]):
                            _add_product(dr[d], a[d][chosen], h, begun or n > 0)
                        if not (begun or previous[d]):
                            dr[d].zero_()
                    if db is not None:
                        if begun:
                            db[d].add_(a[d].sum(0, dtype=torch.float32))
                        else:
                            torch.sum(a[d], 0, dtype=torch.float32, out=db[d])
                    if dx is not None:
                        out = rows.of(dx, *spans[d])
                        out.addmm_(a[d], w[d]) if d or adds else torch.mm(a[d], w[d], out=out)
            del of_x            # which may be copies, before the next chunk makes its own
            yield
    cast = lambda g: g if g is None or x.dtype == torch.float32 else list(map(cast, g)) if isinstance(g, list) else (
        g.to(x.dtype))
    return dx, cast(dw), cast(dr), cast(db), cast(dh) if needs[4] else None, cast(dc) if needs[5] else None
