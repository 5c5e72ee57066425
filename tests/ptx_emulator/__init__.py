"""CPU emulator for the PTX that Triton emits: checks compiled kernels, synchronisation included, without a GPU.

    src = ASTSource(fn=kernel, signature={"x": "*bf16", "y": "*bf16", "T": "i32", "H": "constexpr"},
                    constexprs={"H": 64}, attrs={(0,): [["tt.divisibility", 16]]})
    compiled = triton.compile(src, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})     # no GPU needed
    for seed in range(4):
        stats = launch(compiled, (8,), x, y, T, seed=seed, memory="weak")     # CPU tensors, written in place
    print(stats)                                                              # instructions, barriers, bytes

Gluon kernels compile with `GluonASTSource` and run the same way.  `run` takes PTX text instead.

How it works: the PTX is parsed once into a list of closures.  Every register is a numpy array over the threads of one
CTA, so an instruction is one numpy expression for the whole CTA.  Divergent threads are kept as groups of one program
counter each; the group that is furthest behind runs first, and groups merge when their counters meet.  CTAs are
generators, and a seeded scheduler interleaves them at atomics, strong loads, fences, cluster barriers and mbarrier
waits.  The same seed gives the same run.

Errors, all subclasses of EmulatorError: OutOfBounds, Misaligned, SharedRace, Deadlock, Unsupported, Trap.

The model, where it matters:

* Global memory: one buffer per argument with wide guard gaps; any access outside a buffer raises OutOfBounds.
* Shared memory: poisoned with 0xFF, which is NaN in f16, bf16 and f32.  The race check keeps the last writer and reader
  of every word with a timestamp, and compares it with the barriers that both threads have passed since.  Two threads
  that write equal values to one word are not reported.
* memory="sc": every access takes effect at once.  memory="weak": plain stores stay private to the CTA until one of its
  threads that has synchronised with the storing thread performs a release at gpu scope (some leak early, at random).
  A plain load returns, at random, either current memory or the CTA's snapshot, which is renewed by an acquire: for
  the acquiring threads at once, for the others at the next barrier.  Cache hints (.cg, .nc) make no difference to
  this, as in the PTX memory model.
* cp.async writes its destination when it is waited for, and poison before that; st.async completes later, at random;
  wgmma reads its operands when it is issued.
* tanh.approx.f32 is rounded to 11 significant bits, its documented error; the other approximate functions are exact.
* A loop that polls with plain loads never lets another CTA run, so it hangs, unless `every` of `run` is set.
* The race check ignores atomics on shared memory.  Proxy fences and wgmma.wait_group have no effect, so a missing one
  is not noticed.
* Time stands still while a CTA runs; it advances by `turn_ns` of `run` when the scheduler switches to another CTA.
* Not modelled: .ftz, the duration of instructions, occupancy (except by `resident` of `run`), bulk copies (TMA), types
  narrower than a byte.
"""

from .errors import Deadlock, EmulatorError, Misaligned, OutOfBounds, SharedRace, Trap, Unsupported
from .launcher import launch, run
from .stats import Stats

__all__ = [
    "Deadlock", "EmulatorError", "Misaligned", "OutOfBounds", "SharedRace", "Stats", "Trap", "Unsupported", "launch",
    "run",
]
