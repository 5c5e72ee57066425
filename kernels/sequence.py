"""A layer over time: input products before each time loop, the loops themselves, and weight gradients after them."""
import functools

import torch

from . import exchange, launch, waiting
from .cell import zoneout_arguments
from .precision import INTERPRET, products_in, rounded_to_tf32
from .rows import LIVE, Rows, ends_of, has, lacks, times_of


def finish(chunks):
    """Run the generator ``chunks`` to its end and return what it returns. An error of CUDA then says which kernel has
    given up, if one has."""
    with waiting.explained():
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                return end.value


class Workspace:
    """Memory that layers use one after the other. What they compute together has to be one stream's work."""

    def __init__(self):
        self._parts = {}

    def empty(self, name, like, *shape):
        """``like.new_empty(shape)``: what the layer before had by this name, if it has this shape."""
        found = self._parts.get(name)
        if found is None or found.shape != shape:
            self._parts[name] = found = None        # freed before there is another
            self._parts[name] = found = like.new_empty(shape)
        return found


def step_flags(T, B, directions, lengths, sizes, reset, device, launcher=None):
    """``rows.step_flags`` by one launch. Without ``lengths``, ``sizes`` (T,) may say how many rows each time has.
    launcher: as for ``forward_chunks``."""
    flags = torch.empty(directions, T, B, dtype=torch.uint8, device=device)
    if T and B:
        run = _write_flags(T, B, directions, *((0, 0) if reset is None else reset.stride()))
        run(launcher, (flags, lengths, sizes, reset), ())
    return flags


@functools.lru_cache(launch.KNOWN)
def _write_flags(T, B, directions, *strides):
    return launch.Launch(launch.FLAGS, launch.NO_PLAN[directions], (-(-T * B // 1024), 1), T, B, *strides, waits=False,
                         names=(), BLOCK=1024)


def forward(x, w, r, b, h0, c0, *args, **kwargs):
    """All of ``forward_chunks``: (y, h_n, c_n, kept, gates), h_n and c_n (D, B, H) of x's type. c0 (D, B, H) takes the
    place of c. The other arguments are the same."""
    c = in_fp32(c0)
    y, last, kept, gates = finish(forward_chunks(x, w, r, b, h0, c, *args, **kwargs))
    return y, joined([last]), c.to(x.dtype), kept, gates


def in_fp32(state):
    """A copy of ``state`` in fp32, for the time loops to change."""
    return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def joined(of_layers):
    """h_n (layers D, B, H) of what ``forward_chunks`` returns for each layer."""
    parts = [part for last in of_layers for part in last]
    # not a view, which the caller could not detach_() or edit in place where an operator returns it
    return torch.cat(parts) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def forward_chunks(x, w, r, b, h0, c, flags, plan, save, batch_sizes=None, zoneout=None, launcher=None, steps=None,
                   keep_gates=False, all_live=False, zero_state=False, ends=None, workspace=None):
    """The layer over all steps, as a generator that runs one chunk of steps at a time.

    x            (T, B, I), or packed (rows, I)
    w, r         (D, 4H, I) and (D, 4H, H), or a list of such matrices of each direction
    b            (D, 4H) or None, or a list
    h0           (D, B, H)
    c            (D, B, H) fp32: c0, which becomes c after the last step
    flags        step flags (D, T, B) or None, see ``rows``
    save         whether backward will follow
    batch_sizes  (T,) on the CPU where x is packed, else None; flags then say the same
    zoneout      (seed, rate_h, rate_c) or None; the seed is an int64 tensor of one element, or None for the expectation
    launcher     stands in for ``launch.launch_kernel``, to compile or emulate instead
    steps        of a chunk; None: as many as the plan takes at a time
    keep_gates   with ``save``: whether backward gets the gates' pre-activations and every c, and recomputes nothing
    all_live     whether every step of ``flags`` is known to be live, as where only resets made them
    zero_state   whether h0 is known to be zero
    ends         ``rows.ends_of`` the flags, which the layers of a stack have in common; None: it is made here
    workspace    ``Workspace`` that layers which run one after the other have in common; None: one of its own

    The first ``next`` allocates all that outlives a chunk and yields y, not yet written. Each further one runs a chunk.
    x is read only in the chunk that needs it.

    Returns y (T, B, D H) or packed (rows, D H); h_n as a list of tensors to concatenate; and what backward needs beside
    y: ``kept`` (-, D, B, H) fp32, c before every ``plan.keep_every``-th step except the first, or with ``keep_gates``
    before every step; and ``gates`` (rows, 4H) of x's type, the pre-activations of all steps and directions, chunk by
    chunk. Both are empty without ``save``, gates without ``keep_gates``.
    """
    B, D, H = h0.shape[1], plan.directions, plan.hidden_size
    rows = Rows(x, B, batch_sizes)
    T, empty = rows.T, (workspace or Workspace()).empty
    y = x.new_empty(*x.shape[:-1], D * H)
    keep_gates = keep_gates and save
    keep_every = 1 if keep_gates else plan.keep_every if save else max(T, 1)
    kept = c.new_empty(T if keep_gates else max(-(-T // keep_every), 1) - 1, D, B, H)
    if T == 0 or B == 0:
        yield y
        return y, [h0], kept, x.new_empty(0, 4 * H)
    most, multiplies, chunks = _forward_chunks(plan, T, B, x.shape[-1], x.element_size(), steps, keep_every, keep_gates,
                                               _limit(plan))
    # one product makes all pre-activations: memory that is given to it takes the host longer
    alone = not multiplies and D == 1 and most == T and steps is None
    gates = None if alone and keep_gates else x.new_empty(D * rows.count(0, T) if keep_gates else 0, 4 * H)
    r, of_input, stuck, more = _as_read(r, plan), (), (), zoneout_arguments(zoneout)
    # (B, D H) in memory; of H = 1, reshape alone makes a transposed view
    h = (h0 if D == 1 or zero_state else h0.transpose(0, 1).reshape(B, D * H)).contiguous()
    if multiplies:
        buffer, of_input = x.contiguous(), (_stacked(w), None if b is None else _stacked(b))
    elif not (keep_gates or alone):
        buffer = empty("pre-activations", x, rows.most(D, most), 4 * H)
    if plan.exchanges:
        slots, stuck = empty("slots", x, *exchange.slots_shape(most, plan)), _stuck(plan, x.device)
        if zoneout is not None:
            more["h0_ptr"] = h0.contiguous()
    yield y
    for first, S, spans, loop in chunks:
        if alone:
            with products_in(plan.precision):
                buffer = _input_product(rows.of(x, *spans[0]), w, b, 0)
        elif not multiplies:
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
        loop(launcher, (buffer, r, h, c, y, kept, *sent), (flags, rows.offsets, *of_input, *stuck), **more)
        yield
    if batch_sizes is not None:
        last = y[:, :H].index_select(0, rows.last).unsqueeze(0)
    elif flags is not None and not all_live:
        at, begun = ends_of(flags) if ends is None else ends
        last = y[:, :, :H].gather(0, at.expand(1, B, H))
    else:
        last = _of_step(y, T - 1, 0) if D == 2 else y[T - 1:]
    parts = [last]
    if D == 2:
        parts.append(_of_step(y, 0, 1) if batch_sizes is None else rows.of(y, 0, 1)[None, :, H:])
    if batch_sizes is None and flags is not None and not all_live:
        parts = [torch.where(begun, part, h0[d]) for d, part in enumerate(parts)]
    return y, parts, kept, buffer if alone and keep_gates else gates


def _limit(plan):
    """The wait limit of the time loops of ``plan``. The interpreter has no clock."""
    return waiting.limit() if plan.exchanges and not INTERPRET else None


def _stuck(plan, device):
    """The further argument of a loop with a wait limit."""
    return () if _limit(plan) is None else (waiting.records(device),)


def _time_loop(loop, plan, *numbers, names, limit, **constants):
    """A launch of the time loop of ``plan``. names: of further tensors."""
    found = launch.LOOPS[plan.kind, loop]
    if limit is not None:
        names, constants["limit"] = (*names, "stuck_ptr"), limit
    return launch.Launch(found.kernel, plan, launch.grid_of(plan), *numbers, waits=plan.exchanges,
                         names=("flags_ptr", "offsets_ptr", *names), **found.constants(plan), **constants)


@functools.lru_cache(launch.KNOWN)
def _forward_chunks(plan, T, B, inputs, element, steps, keep_every, keep_gates, limit):
    """(steps of the longest chunk, whether the loop multiplies x by W, the chunks) of a forward pass. A chunk is the
    first step, the number of steps, the times of each direction and the launch."""
    names, constants = (), {}
    multiplies = not keep_gates and plan.multiplies_input(inputs)
    if keep_gates and plan.directions == 2:
        steps = plan.keep_every         # a chunk has to have the steps of one of backward's
    steps = steps or (T if multiplies else plan.forward_steps(T, element))
    if keep_gates:
        constants["KEEP_GATES"] = True
    elif multiplies:
        names, constants["INPUTS"] = ("w_ptr", "b_ptr"), inputs
    chunks, tiles = [], (plan.tiles,) if plan.exchanges else ()
    for first in range(0, T, steps):
        S = min(steps, T - first)
        loop = _time_loop("forward", plan, T, S, B, first, keep_every, *tiles, names=names, limit=limit, **constants)
        chunks.append((first, S, [times_of(d, first, S, T) for d in range(plan.directions)], loop))
    return min(steps, T), multiplies, chunks


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
    D, H = directions, shape[-1]
    B = x.shape[:-1].numel()
    if h0 is not None:
        h0, c0 = h0.contiguous(), c0.contiguous()
    h_n, c_n, y = x.new_empty(shape), x.new_empty(shape), None
    for first in range(0, len(weights), D):
        x, own = x.contiguous(), [None if t is None else t.contiguous() for of in weights[first:first + D] for t in of]
        y = x.new_empty(*x.shape[:-1], D * H) if with_y or first + D < len(weights) else None
        if B:
            run = _one_step(B, x.shape[-1], H, D, precision, first)
            with waiting.explained():       # an error may be that of an earlier kernel
                run(launcher, (x, *own, *(None,) * (8 - len(own)), h0, c0, y, h_n, c_n), ())
        x = y
    return y, h_n, c_n


@functools.lru_cache(launch.KNOWN)
def _one_step(B, inputs, H, D, precision, first):
    step = launch.step_of(B, inputs, H, D, precision)
    return launch.Launch(launch.STEP, step, step.grid(B), B, first, waits=False, names=(), **step.constants)


def _state(y, h0, flags, rows, first):
    """h (B, D H) before the step that each direction takes as its ``first``, which is not 0."""
    H, states = h0.shape[-1], []
    for d in range(len(h0)):
        time = first - 1 if d == 0 else rows.T - first
        h = rows.of(y, time, time + 1)[:, d * H:(d + 1) * H]
        if len(h) < h0.shape[1]:            # packed: others have not begun yet
            h = torch.cat([h, h0[d, len(h):]])
        if flags is not None and d == 1:
            h = torch.where(has(flags[1, time], LIVE), h, h0[1])      # or has not begun yet
        states.append(h)
    return states[0] if len(states) == 1 else torch.cat(states, 1)


def _of_step(y, time, d):
    """h of a direction (1, B, H) in y (T, B, 2 H), which has memory of its own. An index takes the host twice as
    long."""
    _, B, units = y.shape
    return y.as_strided((1, B, units // 2), (B * units, units, 1), time * B * units + d * units // 2)


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


def _input_product(rows, w, b, d, out=None):
    # the same product as addmm or mm with w[d].t(), by a call less; ``out`` is in its schema, not in its documentation
    return torch.nn.functional.linear(rows, w[d], None if b is None else b[d], out=out)


def _before(plan, T, B, d, span, zero_state):
    """Where h before the steps at times ``span`` is, of padded rows without step flags: pairs of the rows of the chunk
    and where y as a matrix has it, or None for h0. Where h0 is known to be zero it is left out."""
    (lo, hi), D, H = span, plan.directions, plan.hidden_size
    of_y = lambda lo, hi: slice(lo * B, hi * B) if D == 1 else (slice(lo * B, hi * B), slice(d * H, (d + 1) * H))
    of_first = lambda at: [] if zero_state else [(slice(at, at + B), None)]
    if d == 0 and lo == 0:
        pairs = [*of_first(0), (slice(B, hi * B), of_y(0, hi - 1))]
    elif d == 1 and hi == T:
        last = (hi - lo - 1) * B
        pairs = [(slice(0, last), of_y(lo + 1, hi)), *of_first(last)]
    else:
        shift = -1 if d == 0 else 1
        pairs = [(slice(0, (hi - lo) * B), of_y(lo + shift, hi + shift))]
    return [(chosen, at) for chosen, at in pairs if chosen.stop > chosen.start]


@functools.lru_cache(launch.KNOWN)
def _backward_chunks(plan, T, B, keep_gates, derives, zero_state, without_dy, sums, strides, limit):
    """The chunks of a backward pass, from the last. Each is the first step, the number of steps, the times of each
    direction, ``_before`` of each, and three launches: of the kernel that copies h before each step, where there are
    step flags; of the one that prepares what the loop reads; and of the loop.

    sums: whether the loop adds up da. strides: of dy (T, B, D H), or packed, in the order time, row, unit; of packed
    rows the first two are one
    """
    D, H, K = plan.directions, plan.hidden_size, plan.keep_every
    dy_unit = D * H if not without_dy and all(n % (D * H) == 0 for n in strides[:2]) else 1
    numbers = *((plan.tiles,) if plan.exchanges else ()), *(n // dy_unit for n in strides[:2]), strides[2]
    names = "dy_ptr", *(["kept_ptr"] if derives else []), *(["db_ptr"] if sums else [])
    blocks = -(-B * H // 256)
    # of kept gates each step has its own programs; a grid has 65535 of them at most
    steps, keep_every = (-(-K // 65535), 1) if keep_gates else (K, K)
    prepare = lambda kernel, grid, *numbers: launch.Launch(kernel, plan, grid, *numbers, waits=False, BLOCK=256)
    chunks = []
    for first in reversed(range(0, T, K)):
        S = min(K, T - first)
        spans, at = [times_of(d, first, S, T) for d in range(D)], (T, S, B, first)
        chunks.append((
            first, S, spans, [_before(plan, T, B, d, spans[d], zero_state) for d in range(D)],
            prepare(launch.PREVIOUS, (blocks * S, D), *at, blocks),
            prepare(launch.STATES, (blocks, D), *at, K) if derives else
            prepare(launch.COEFFICIENTS, (blocks, D, -(-S // steps)), *at, steps, keep_every, 0 if keep_gates else 1),
            _time_loop("backward", plan, *at, *numbers, names=names, limit=limit, DY_UNIT=dy_unit)))
    return chunks


def _add_product(total, a, b, begun):
    """The sum of ``total`` and a b, in fp32 whatever the operands' type. Unless it has ``begun``, total is memory for
    the result, or None."""
    options = {}
    if a.dtype != torch.float32:
        if a.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads():
            if begun:
                total += torch.mm(a, b, out_dtype=torch.float32)
                return total
            options = dict(out_dtype=torch.float32)
        else:
            a, b = a.float(), b.float()
    if begun:
        return total.addmm_(a, b)
    # memory from the product itself takes the host less than memory that is given to it
    return torch.mm(a, b, **options) if total is None else torch.mm(a, b, out=total, **options)


def backward(dy, dh_n, dc_n, x, w, r, b, h0, c0, flags, y, kept, gates, plan, needs, *args, **kwargs):
    """All of ``backward_chunks``: (dx, dw, dr, db, dh0, dc0), of x's type.

    dh_n, dc_n    gradients of h_n and c_n (D, B, H), or None; they take the place of dh and dc
    needs         which of the six gradients are wanted; the others are None

    The other arguments are the same.
    """
    (dh, dc), = state_gradients(dh_n, dc_n, needs[4] or needs[5], 1, h0.shape, x)[1]
    gradients = finish(backward_chunks(dy, dh, dc, x, w, r, b, h0, c0, flags, y, kept, gates, plan, needs, *args,
                                       **kwargs))
    return *gradients, *(g.to(x.dtype) if need else None for g, need in zip((dh, dc), needs[4:]))


def state_gradients(dh_n, dc_n, wanted, layers, shape, x):
    """(dh and dc of all layers, or two None; dh and dc of each layer) in fp32 for ``backward_chunks``.

    dh_n, dc_n    gradients of h_n and c_n (layers D, B, H), or None
    wanted        whether the caller gets those of all layers, and so each has memory of its own
    shape         of the state of a layer, (D, B, H)
    """
    D, B, H = shape
    if dh_n is dc_n is None and not wanted:
        parts = x.new_zeros(2 * layers * D, B, H, dtype=torch.float32).chunk(2 * layers)
        return [None, None], list(zip(parts[:layers], parts[layers:]))
    both = [x.new_zeros(layers * D, B, H, dtype=torch.float32) if g is None else in_fp32(g) for g in (dh_n, dc_n)]
    return both, list(zip(*[[g] if layers == 1 else g.chunk(layers) for g in both]))


def backward_chunks(dy, dh, dc, x, w, r, b, h0, c0, flags, y, kept, gates, plan, needs, batch_sizes=None, zoneout=None,
                    launcher=None, all_live=False, zero_state=False, zero_past_ends=False, dx=None, workspace=None):
    """The gradients of ``forward``, as a generator that runs one chunk of ``plan.keep_every`` steps at a time, from the
    last: it recomputes the gates by products over the whole chunk, unless forward kept them, turns them into
    coefficients, unless the loop does so, then runs the time loop backwards.

    dy               gradient of y, or None
    dh, dc           (D, B, H) fp32: gradients of h_n and c_n, which become dh0 and dc0
    y, kept, gates   what ``forward`` returned; gates may also be None
    needs            which of dx, dw, dr and db are wanted; the others are None. Those of w, r and b are lists of D
                     tensors where w is a list, and then each has memory of its own
    all_live, zero_state, workspace    as for ``forward_chunks``
    zero_past_ends   whether x is known to be zero at steps that are not live, as y of another layer is
    dx               memory for dx of one direction, where another layer reads it after each chunk; else None

    The first ``next`` allocates all that outlives a chunk, unless the only chunk makes it. Each further one runs a
    chunk. dy is read only in the chunk that needs it. Returns (dx, dw, dr, db).
    """
    plan = plan.backward
    B, D, H, K = h0.shape[1], plan.directions, plan.hidden_size, plan.keep_every
    rows = Rows(x, B, batch_sizes)
    T, empty = rows.T, (workspace or Workspace()).empty

    def total(need, *shape):
        """(a gradient, its parts of each direction), which have no memory yet where they have memory of their own."""
        if not need:
            return None, None
        zero = T == 0 or B == 0         # without steps or rows
        if not isinstance(w, torch.Tensor):
            parts = [dh.new_zeros(shape) if zero else None for _ in range(D)]
            return parts, parts
        whole = (dh.new_zeros if zero else dh.new_empty)(D, *shape)
        return whole, list(whole)

    (dw, of_w), (dr, of_r) = total(needs[1], 4 * H, x.shape[-1]), total(needs[2], 4 * H, H)
    db, of_b = total(needs[3], 4 * H)
    # of one chunk, the second direction adds to what the first has written
    adds = D == 2 and T > K
    alone = 0 < T <= K and B > 0 and dx is None         # then its product makes it
    if needs[0] and dx is None and not alone:
        dx = (x.new_zeros if adds else x.new_empty)(x.shape)
    if T and B:
        r_as_read, c0, h0 = _as_read(r, plan), c0.float().contiguous(), h0.contiguous()
        # packed, the first two are one
        strides = (0, 0, 1) if dy is None else (dy.stride(0), dy.stride(-2), dy.stride(-1))
        keep_gates = gates is not None and len(gates) > 0
        derives, coef = plan.derives_coefficients and zoneout is None, None
        # a loop that adds up da itself spares reading it again
        sums = None
        if plan.adds_up_da and needs[3]:
            sums = empty("sums", dh, plan.groups, *(() if D == 1 else (D,)), 4 * H)
        chunks = _backward_chunks(plan, T, B, keep_gates, derives, zero_state, dy is None, sums is not None, strides,
                                  _limit(plan))
        most = rows.most(D, min(K, T))
        count = 6 if zoneout is None else 8
        buffer = empty("da", x, most, 4 * H)
        if not derives:
            coef = empty("coefficients", dh, most, count * H)
        elif not keep_gates:
            states = empty("states", dh, min(K, T), D, B, H)
        needs_previous = needs[2] or not keep_gates
        h_before = None if flags is None or not needs_previous else empty("h before", x, most, H)
        shares, stuck, of_kept = (exchange.new_shares(dh, plan),) if plan.exchanges else (), _stuck(plan, x.device), ()
        of_sums = () if sums is None else (sums,)
        of_coefficients = zoneout_arguments(zoneout)
        more = {} if zoneout is None else dict(COUNT=count)
    yield
    if T and B:
        for first, S, spans, before, of_previous, of_states, loop in chunks:
            begun = first + S < T
            a = rows.split(buffer, spans)
            of_x = [rows.of(x, *span) for span in spans]
            if not needs_previous:
                previous = []
            elif flags is None:
                columns = rows.of(y, 0, T)
                previous = [[(chosen, h0[d] if of_y is None else columns[of_y]) for chosen, of_y in before[d]]
                            for d in range(D)]
            else:
                of_previous(launcher, (y, h0, h_before), (flags, rows.offsets))
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
                of_states(launcher, (of_gates, c0, kept, coef), (flags, rows.offsets), **of_coefficients)
            elif keep_gates:
                of_kept = kept[first:] if first else kept,
            else:
                of_kept = states,
                of_states(launcher, (of_gates, c0, kept, states), (flags, rows.offsets))
            # from here on a and its buffer hold da
            loop(launcher, (of_gates if derives else coef, r_as_read, buffer, dh, dc, *shares),
                 (flags, rows.offsets, dy, *of_kept, *of_sums, *stuck), **more)
            with products_in(plan.precision):
                for d in range(D):
                    of_units = a[d].t()
                    if of_w is not None:
                        if flags is not None and batch_sizes is None and not (all_live or zero_past_ends):
                            # past a row's end da is zero, but x may be anything
                            of_x[d] = of_x[d].masked_fill(lacks(flags[d, slice(*spans[d])], LIVE).view(-1, 1), 0)
                        of_w[d] = _add_product(of_w[d], of_units, of_x[d], begun)
                    if of_r is not None:
                        for part, (chosen, h) in enumerate(previous[d]):
                            of_r[d] = _add_product(of_r[d], of_units[:, chosen], h, begun or part > 0)
                        if not (begun or previous[d]):
                            of_r[d] = dh.new_zeros(4 * H, H) if of_r[d] is None else of_r[d].zero_()
                    if of_b is not None:
                        of_rows = a[d] if sums is None else sums if D == 1 else sums[:, d]
                        if begun or of_b[d] is None:
                            of_chunk = of_rows.sum(0, dtype=torch.float32)
                            of_b[d] = of_b[d].add_(of_chunk) if begun else of_chunk
                        else:
                            torch.sum(of_rows, 0, dtype=torch.float32, out=of_b[d])
                    if needs[0] and alone:
                        dx = torch.mm(a[d], w[d]) if d == 0 else dx.addmm_(a[d], w[d])
                    elif needs[0]:
                        out = rows.of(dx, *spans[d])
                        out.addmm_(a[d], w[d]) if d or adds else torch.mm(a[d], w[d], out=out)
            del of_x            # which may be copies, before the next chunk makes its own
            if needs[0] and alone:
                dx = dx.view(x.shape)
            yield
    cast = lambda g: g if g is None or x.dtype == torch.float32 else list(map(cast, g)) if isinstance(g, list) else (
        g.to(x.dtype))
    return dx, cast(dw), cast(dr), cast(db)
