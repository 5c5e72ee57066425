"""Entry points: run PTX, or what triton.compile returned."""

import re
import struct

import numpy as np
import torch

from .device import Device
from .global_memory import GlobalMemory
from .program import Program

_programs = {}  # (ptx, threads, entry) -> Program, as tests run the same kernel many times
MOST_PROGRAMS = 64


def run(ptx, grid, threads=None, params=(), shared_bytes=0, cluster=None, seed=0, memory="sc", checks=True,
        every=0, resident=None, patience=3000, turn_ns=1000, names=None, entry=None):
    """Run one kernel and return its Stats.

    grid        number of CTAs, up to three dimensions, the first a multiple of the cluster size
    threads     threads per CTA, by default what the kernel requires
    params      in PTX order: numpy arrays and torch CPU tensors are buffers, written in place; numbers are scalars;
                None is a null pointer
    names       of the parameters, for messages
    shared_bytes    dynamic shared memory
    cluster     CTAs per cluster, by default what the kernel requires
    memory      "sc" or "weak", see the docstring of the package
    checks      whether to look for races in shared memory
    every       if set, also switch to another CTA after this number of instructions
    resident    the largest number of CTAs that run at once
    patience    number of turns per CTA without any progress that count as a deadlock
    turn_ns     by how much each turn of a CTA advances %globaltimer
    entry       name of the kernel, by default the first"""
    if memory not in ("sc", "weak"):
        raise ValueError("memory is 'sc' or 'weak'")
    prog = parsed(ptx, threads, entry)
    if len(params) < len(prog.params):
        raise ValueError(f"{len(params)} parameters given, the kernel has {len(prog.params)}")
    names = names or [f"param {i}" for i in range(len(params))]
    mem = GlobalMemory(memory == "weak")
    addresses = place_buffers(mem, names, params)
    packed = {pname: pack(value, ty, nbytes, addresses.get(name))
              for (pname, ty, nbytes), name, value in zip(prog.params, names, params)}
    device = Device(prog, grid, mem, packed, shared_bytes, cluster or prog.cluster, seed, checks, every, resident,
                    patience, turn_ns)
    device.globals = {name: mem.add(name, n, data) for name, (n, data) in prog.globals.items()}
    mem.seal()
    try:
        with np.errstate(all="ignore"):
            return device.run()
    finally:
        mem.copy_back()


def launch(compiled, grid, *args, seed=0, memory="sc", checks=True, **options):
    """Run what triton.compile returned and return its Stats.

    grid as in Triton (programs); args: the arguments that are not constexpr, in signature order; tensors are written
    in place.  Further options as in `run`; `ptx` replaces the kernel's own PTX, to run an edited one."""
    meta = compiled.metadata
    signature = getattr(compiled.src, "signature", {})
    names = [k for k, t in signature.items() if t != "constexpr"] if isinstance(signature, dict) else []
    if names and len(names) != len(args):
        raise ValueError(f"{len(args)} arguments for {names}")
    ctas = getattr(meta, "num_ctas", 1)
    grid = tuple(grid) + (1,) * (3 - len(grid))
    grid = (grid[0] * ctas, *grid[1:])
    params = list(args)
    for kind in ("global", "profile"):  # Triton appends pointers to scratch memory
        size = getattr(meta, f"{kind}_scratch_size", 0) or 0
        params.append(np.zeros(size * int(np.prod(grid)), np.uint8) if size else None)
        names.append(f"{kind} scratch")
    declared = len(re.findall(r"\.param", compiled.asm["ptx"].split(".entry")[1].split("{")[0]))
    ptx = options.pop("ptx", None) or compiled.asm["ptx"]
    return run(ptx, grid, None, params[:declared], meta.shared, ctas, seed, memory, checks, names=names[:declared],
               **options)


def parsed(ptx, threads, entry):
    key = (ptx, threads, entry)
    if key not in _programs:
        if len(_programs) > MOST_PROGRAMS:
            _programs.clear()
        _programs[key] = Program(ptx, threads, entry)
    return _programs[key]


def place_buffers(mem, names, params):
    """Add the arrays among the parameters to memory; name -> address.  An array inside another shares its buffer."""
    spans = []  # (name, address here, bytes of the storage that is reached)
    for name, v in zip(names, params):
        if isinstance(v, torch.Tensor):
            if v.device.type != "cpu":
                raise ValueError(f"{name}: only CPU tensors")
            n = 0 if v.numel() == 0 else 1 + sum((s - 1) * t for s, t in zip(v.shape, v.stride()))
            flat = v.detach().as_strided((n,), (1,), v.storage_offset()).view(torch.uint8).numpy()
            spans.append((name, v.data_ptr(), flat))
        elif isinstance(v, np.ndarray):
            if not v.flags.c_contiguous:
                raise ValueError(f"{name}: numpy arrays must be contiguous")
            spans.append((name, v.ctypes.data, v.reshape(-1).view(np.uint8)))
    addresses, last, end = {}, None, 0  # last: (name, address here) of the last buffer added, which ends at `end`
    for name, ptr, flat in sorted(spans, key=lambda span: (span[1], -len(span[2]))):
        if last and ptr < end and ptr + len(flat) <= end:
            addresses[name] = addresses[last[0]] + ptr - last[1]
        elif last and ptr < end:
            raise ValueError(f"{name} and {last[0]} overlap in part")
        else:
            addresses[name] = mem.add(name, len(flat), flat)
            last, end = (name, ptr), ptr + len(flat)
    return addresses


def pack(value, ty, nbytes, buffer_address):
    """The bytes of one parameter."""
    if buffer_address is not None:
        return struct.pack("<Q", buffer_address)
    if isinstance(value, (float, np.floating)) or ty in ("f32", "f64", "f16"):
        return struct.pack({8: "<d", 4: "<f", 2: "<e"}[nbytes], value)
    return (int(value or 0) & (2**(8 * nbytes) - 1)).to_bytes(nbytes, "little")
