"""Waiting that ends: a program that waits for another longer than a limit leaves a record and traps.

A fault of the protocol, or a program that never ran, is then an error of CUDA and not a process that hangs. The record
lies in pinned host memory, where the host can read it after the error, when nothing on the GPU can be reached any more.
"""
import atexit
import functools
import math
import os
import sys

import torch
import triton
import triton.language as tl

KERNELS = ("forward_grid", "backward_grid", "forward_grid_gluon", "forward_split_gluon", "backward_split_gluon")
FORWARD_GRID, BACKWARD_GRID, FORWARD_WGMMA, FORWARD_SPLIT, BACKWARD_SPLIT = map(tl.constexpr, range(1, 6))
SLOTS, FIELDS = 4096, 8     # records, by program, and words of each: see ``give_up``
TICK_BITS = 20              # the clock is looked at in units of 2^20 ns, so that a wait needs one register for it
LINGER_MS = 64              # between a record and its trap, which ends all programs: others who wait leave theirs


@triton.constexpr_function
def give_up(kernel, since, stuck, limit, first, step, tile):
    """PTX for the slow path of a wait of ``kernel``, after a look in vain; the others are names of its operands.

    ``since``, a register of 32 bits that is zero before the first look, is when the wait began. Past ``limit`` ticks
    the program's record goes to ``stuck``: the kernel, the program's three indices, how many there are of the first,
    the step counted from the first of the sequence in the kernel's direction, the batch tile, and a thread that waits.
    """
    return f"""
        .reg .pred late; .reg .b64 now, slot; .reg .b32 n<7>;
        mov.u64 now, %globaltimer; shr.u64 now, now, {TICK_BITS}; cvt.u32.u64 n0, now;
        setp.eq.u32 late, {since}, 0; selp.b32 {since}, n0, {since}, late;
        sub.u32 n0, n0, {since}; setp.gt.s32 late, n0, {limit};
        @!late bra GOES_ON;
        mov.u32 n1, %ctaid.x; mov.u32 n2, %ctaid.y; mov.u32 n3, %ctaid.z; mov.u32 n4, %nctaid.x;
        mov.u32 n5, %nctaid.y; mad.lo.u32 n5, n3, n5, n2; mad.lo.u32 n5, n5, n4, n1;
        and.b32 n5, n5, {SLOTS - 1}; mad.wide.u32 slot, n5, {4 * FIELDS}, {stuck};
        mov.u32 n0, {kernel}; st.volatile.global.v4.b32 [slot], {{n0, n1, n2, n3}};
        add.u32 n0, {first}, {step}; mov.u32 n6, %tid.x; st.volatile.global.v4.b32 [slot+16], {{n4, n0, {tile}, n6}};
        fence.sc.sys;
        mov.u32 n0, {LINGER_MS};
        LINGER: .pragma "nounroll"; nanosleep.u32 1000000; sub.u32 n0, n0, 1; setp.ne.u32 late, n0, 0; @late bra LINGER;
        trap;
        GOES_ON:"""


@triton.jit
def look_at_clock(since, watch, KERNEL: tl.constexpr):
    """After a look in vain, of which a wait's first has ``since`` zero: the ``since`` of the next one, or the end.
    watch: (stuck, limit, first, step, tile) of ``give_up``; a program's threads all come here."""
    if watch[0] is None:        # in the interpreter
        return since
    else:
        PTX: tl.constexpr = give_up(KERNEL, "$0", "$2", "$3", "$4", "$5", "$6")
        ASM: tl.constexpr = "{ mov.b32 $0, $1; " + PTX + " }"
        return tl.inline_asm_elementwise(ASM, "=&r,r,l,r,r,r,r",
                                         [since, watch[0].to(tl.uint64), watch[1], watch[2], watch[3], watch[4]],
                                         dtype=tl.int32, is_pure=False, pack=1)


@functools.lru_cache
def records(device):
    """The records (SLOTS, FIELDS) int32 that programs on ``device`` leave, all zero before; 0 in the first word: none."""
    return torch.zeros(SLOTS, FIELDS, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


def arguments(device):
    """What a launch whose programs wait for each other needs for that."""
    return dict(stuck_ptr=records(device), limit=10000)
