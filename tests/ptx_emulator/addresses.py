"""Where the emulator puts things in the address space.

A shared-memory address is an offset into the CTA's own shared memory or, in the shared::cluster window, an offset plus
a multiple of REMOTE that names the CTA's rank.  Generic addresses of shared memory start at SHARED_GENERIC.
"""

GLOBAL_BASE = 1 << 40  # address of the first byte of the global arena
SHARED_GENERIC = 1 << 60  # generic address of byte 0 of the CTA's own shared memory
REMOTE = 1 << 24  # shared::cluster address of rank r: (r + 1) * REMOTE + offset
PARAMETER_PAGE = 4096  # bytes of the parameter space for each parameter
