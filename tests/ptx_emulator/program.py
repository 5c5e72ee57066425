"""The PTX of one kernel, parsed."""

import re

import numpy as np

from .addresses import PARAMETER_PAGE
from .errors import Unsupported
from .formats import BITS, UINT
from .instructions import build
from .operands import NAME, Register, parse, split_operands


class Instruction:
    """One instruction.  Its builder sets `fn` and, where the execution loop has something to do, `control`:

    None              fn(cta, mask) does it all
    "yield"           other CTAs may get in before fn
    "poll"            fn is one attempt to wait
    "branch"          to instruction `target`
    "indexed branch"  fn returns each thread's index into the list `target`
    "barrier"         fn returns (barrier, number of threads or None)
    "cluster wait"    until the cluster barrier is complete
    "exit"            of the threads
    """
    __slots__ = ("op", "parts", "args", "guard", "negate", "line", "loc", "text", "fn", "control", "target", "scope")

    def __init__(self, line, loc, text, scope):
        self.line, self.loc, self.text = line, loc, text  # PTX line number, source position, PTX text
        self.scope = scope  # the blocks that it lies in, outermost first
        self.guard, self.negate = None, False  # predicate register
        self.fn = self.control = self.target = None


class Program:
    """Parsed PTX of one kernel for a fixed number of threads per CTA."""

    def __init__(self, ptx, threads=None, entry=None):
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
        lines = ptx.split("\n")
        head = self.find_entry(lines, entry)
        self.name = re.search(r"\.entry\s+([\w$]+)", lines[head]).group(1)
        body = next(i for i in range(head, len(lines)) if lines[i].strip() == "{")
        header = "\n".join(lines[head:body])
        self.params = []  # (name, type, bytes)
        for p in re.finditer(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+((?:\.\w+\s+|\d+\s+)*)([\w$]+)(?:\[(\d+)\])?",
                             header):
            self.params.append((p.group(3), p.group(1), BITS[p.group(1)] // 8 * int(p.group(4) or 1)))
        required = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", header)
        self.threads = threads or int(required.group(1))
        cluster = re.search(r"\.reqnctapercluster\s+(\d+)", header)
        self.cluster = int(cluster.group(1)) if cluster else 1
        self.lane = np.arange(self.threads) & 31

        # variable -> (space, offset); each parameter has a page of its own
        self.symbols = {name: ("param", n * PARAMETER_PAGE) for n, (name, _, _) in enumerate(self.params)}
        self.globals = {}  # global and constant variables -> (bytes, initial data)
        self.static_shared, self.local_size = 0, 0
        self.dynamic = []  # names of the dynamic shared memory
        self.reg_bits = []  # width of every register
        self.scopes = [{}]  # registers of the open blocks: name -> Register
        self.constants = {}  # see operands.constant
        self.instructions = []
        self.labels = {}  # (label, block) -> instruction index
        self.tables = {}  # label of .branchtargets -> labels
        for line in lines[:head]:
            self.declare(line)
        self.parse(lines, body)
        self.static_shared = (self.static_shared + 1023) // 1024 * 1024
        for name in self.dynamic:
            self.symbols[name] = ("shared", self.static_shared)
        self.word_bytes = self.narrowest_access()
        for ins in self.instructions:
            build(self, ins)

    @staticmethod
    def find_entry(lines, entry):
        starts = [i for i, line in enumerate(lines) if re.search(r"\.entry\s", line)]
        if entry:
            starts = [i for i in starts if re.search(r"\.entry\s+" + re.escape(entry) + r"\b", lines[i])]
        if not starts:
            raise Unsupported("no kernel entry in the PTX")
        return starts[0]

    def declare(self, line):
        """A variable declaration, if the line is one."""
        line = line.split("//")[0]
        m = re.search(r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?(?:\.attribute\S+\s+)?\.(\w+)\s+"
                      r"([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*\{?([^};]*)\}?)?", line)
        if not m:
            return
        space, align, ty, name, num, init = m.groups()
        align, size = int(align or 4), BITS[ty] // 8
        if space == "shared" and num == "":
            self.dynamic.append(name)
            return
        nbytes = size * int(num or 1)
        if space == "shared":
            offset = (self.static_shared + align - 1) // align * align
            self.static_shared = offset + nbytes
        elif space == "local":
            offset = (self.local_size + align - 1) // align * align
            self.local_size = offset + nbytes
        else:
            data = np.zeros(nbytes, np.uint8)
            if init and init.strip():
                values = [int(v, 0) for v in init.split(",")]
                data[:len(values) * size] = np.array(values, UINT[8 * size]).view(np.uint8)
            data.flags.writeable = False
            self.globals[name] = (nbytes, data)
            offset = 0
        self.symbols[name] = (space, offset)

    def parse(self, lines, body):
        """Everything between the outer braces."""
        loc, buf, first = "?", "", body  # buf: a statement that goes on over several lines, `first` its first line
        self.blocks, self.label, blocks = [], None, 0  # open blocks, the last label, number of blocks so far
        for num in range(body, len(lines)):
            line = lines[num]
            stripped = line.strip()
            if re.match(r"\.loc\s", stripped):
                fields = stripped.split()
                loc = f"{self.files.get(fields[1], '?')}:{fields[2]}"
                continue
            if not buf and stripped.startswith((".file", ".section", ".pragma")):
                continue
            line = line.split("//")[0].strip()
            while line:
                if not buf:
                    first = num + 1
                    if line[0] in "{}":
                        if line[0] == "{":
                            blocks += 1
                            self.blocks.append(blocks)
                            self.scopes.append({})
                        else:
                            self.blocks.pop()
                            self.scopes.pop()
                            if not self.blocks:
                                return
                        line = line[1:].strip()
                        continue
                    m = re.match(r"(\$?[\w$]+):\s*", line)
                    if m:
                        self.label = (m.group(1), self.blocks[-1])
                        self.labels[self.label] = len(self.instructions)
                        line = line[m.end():]
                        continue
                k = line.find(";")
                if k < 0:
                    buf += " " + line
                    break
                self.statement((buf + " " + line[:k]).strip(), first, loc)
                buf, line = "", line[k + 1:].strip()

    def statement(self, text, line, loc):
        """A directive or an instruction, without its semicolon."""
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self.declare_registers(text)
            return
        if text.startswith(".branchtargets"):
            self.tables[self.label[0]] = split_operands(text.split(None, 1)[1])
            return
        if text.startswith("."):
            self.declare(text)
            return
        ins = Instruction(line, loc, " ".join(text.split()), tuple(self.blocks))
        m = re.match(r"@(!?)(" + NAME + r")\s+", text)
        if m:
            ins.negate, ins.guard = bool(m.group(1)), parse(m.group(2), self.scopes).index
            text = text[m.end():]
        m = re.match(r"([a-z][\w.:]*)\s*(.*)", text, re.S)
        if not m:
            raise Unsupported(f"cannot parse line {line}: {ins.text}")
        ins.op = m.group(1)
        ins.parts = ins.op.replace("::", ":").split(".")
        operands = [] if ins.parts[0] == "call" else split_operands(m.group(2))
        ins.args = [parse(x, self.scopes) for x in operands]
        self.instructions.append(ins)

    def declare_registers(self, text):
        """.reg .b32 %r<40>, %x;"""
        bits = BITS[text.split()[1].lstrip(".")]
        for declaration in text.split(None, 2)[2].split(","):
            m = re.match(r"\s*([%\w$]+)(?:<(\d+)>)?", declaration)
            names = [m.group(1)] if m.group(2) is None else [f"{m.group(1)}{i}" for i in range(int(m.group(2)))]
            for name in names:
                self.scopes[-1][name] = Register(len(self.reg_bits), bits)
                self.reg_bits.append(bits)

    def target(self, ins, name):
        """Instruction index of a label, which is local to its block."""
        return next(self.labels[name, block] for block in reversed(ins.scope) if (name, block) in self.labels)

    def narrowest_access(self):
        """Bytes of the words of the shared-memory race check."""
        narrowest = 16
        for ins in self.instructions:
            p = ins.parts
            if p[0] in ("ld", "st") and any(x.startswith("shared") for x in p):
                count = next((int(x[1:]) for x in p if x in ("v2", "v4", "v8")), 1)
                narrowest = min(narrowest, BITS[p[-1]] // 8 * count)
            elif p[0] in ("atom", "red", "wgmma") or (p[0] == "cp" and ins.args and len(ins.args) > 2):
                narrowest = min(narrowest, 4)
        return narrowest
