"""Which builder makes which instruction."""

from ..errors import Unsupported

BUILDERS = {}  # first part of the opcode -> builder


def builds(*names):
    """Decorator: the function builds the instructions whose opcodes begin with these names."""
    def register(builder):
        for name in names:
            BUILDERS[name] = builder
        return builder
    return register


def build(prog, ins):
    """Give the instruction its closure fn(cta, mask) and its control kind."""
    place = f"PTX line {ins.line}: {ins.text}"
    builder = BUILDERS.get(ins.parts[0])
    if builder is None:
        raise Unsupported(f"instruction {ins.op} at {place}")
    try:
        ins.fn = builder(prog, ins, ins.parts, ins.args, ins.parts[-1])
    except Unsupported as e:
        raise Unsupported(f"{e}; {place}") from None
    except (AttributeError, KeyError, IndexError, ValueError) as e:  # a modifier or kind of operand that is not known
        raise Unsupported(f"cannot build {ins.op} ({type(e).__name__} {e}); {place}") from e
