"""What can go wrong with a kernel.  Nearly all messages end with the CTA, the source line and the PTX line."""


class EmulatorError(Exception):
    """Base class of all errors that the emulator raises about a kernel."""


class OutOfBounds(EmulatorError):
    """An access outside every buffer, outside shared memory, or in the shared memory of a CTA that has exited."""


class Misaligned(EmulatorError):
    """An address that is not a multiple of the access width."""


class SharedRace(EmulatorError):
    """Two threads access one word of shared memory, at least one of them writes, and no barrier orders them."""


class Deadlock(EmulatorError):
    """Nothing makes progress any more: a barrier, a flag or an mbarrier that is never completed."""


class Unsupported(EmulatorError):
    """An instruction, type or operand that the emulator does not know."""


class Trap(EmulatorError):
    """The kernel executed `trap`, or a device assertion failed."""
