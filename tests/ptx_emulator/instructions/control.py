"""Branches, exits, calls, and hints that the emulator can ignore."""

from ..errors import Trap, Unsupported
from ..operands import reader
from .registry import builds


def nothing(cta, mask):
    pass


@builds("bra", "brx")
def build_branch(prog, ins, parts, args, ty):
    if parts[0] == "bra":
        ins.control, ins.target = "branch", prog.target(ins, args[0].name)
        return nothing
    ins.control, ins.target = "indexed branch", [prog.target(ins, label) for label in prog.tables[args[1].name]]
    index = reader(prog, args[0], "u32")
    return lambda cta, mask: index(cta)


@builds("ret", "exit")
def build_exit(prog, ins, parts, args, ty):
    ins.control = "exit"
    return nothing


@builds("trap")
def build_trap(prog, ins, parts, args, ty):
    def trap(cta, mask):
        raise Trap(f"trap, {cta.where()}")
    return trap


@builds("call")
def build_call(prog, ins, parts, args, ty):
    """Triton calls only two functions: printf, which is ignored, and the failure of an assertion."""
    if "__assertfail" in ins.text:
        def fail(cta, mask):
            raise Trap(f"device assertion, {cta.where()}")
        return fail
    if "vprintf" not in ins.text:
        raise Unsupported("function call")
    return nothing


@builds("nanosleep")
def build_nanosleep(prog, ins, parts, args, ty):
    ins.control = "yield"
    return nothing


@builds("brkpt", "griddepcontrol", "prefetch", "prefetchu", "discard", "applypriority", "setmaxnreg",
        "pmevent", "createpolicy")
def build_nothing(prog, ins, parts, args, ty):
    return nothing
