"""The documents of the project and what can be tested of them: Python snippets and command lines."""
import ast
import contextlib
import dataclasses
import importlib
import io
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in ("triton_lstm", "kernels", "tests", "bench")
                                          for path in (ROOT / folder).rglob("*.md") if "results" not in path.parts)])


def name(path):
    """A document as it is called in tests."""
    return str(path.relative_to(ROOT))


@dataclasses.dataclass(frozen=True)
class Block:
    """Text between two fences, or one line between others if ``fence`` is None.

    line     number of its first line
    heading  under which it stands
    fence    what stands after the first fence
    """
    page: Path
    line: int
    heading: str
    fence: str | None
    text: str

    @property
    def needs(self):
        """What a Python snippet needs beyond the package's own requirements: "gpu", or packages."""
        return self.fence.split()[1:]

    def __str__(self):
        return f"{name(self.page)}:{self.line}"


def blocks(page):
    """The ``Block`` of each line and each pair of fences."""
    found, heading, opened = [], "", None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened = number + 1, line[3:].strip(), []
            else:
                first, fence, lines = opened
                found.append(Block(page, first, heading, fence, "\n".join(lines) + "\n"))
                opened = None
        elif opened is not None:
            opened[2].append(line)
        else:
            if line.startswith("#"):
                heading = line.lstrip("#").strip()
            found.append(Block(page, number, heading, None, line))
    assert opened is None, f"{page}: no fence closes that of line {opened[0] - 1}"
    return found


def snippets(page):
    """The Python snippets of a document, in its order."""
    return [block for block in blocks(page) if block.fence is not None and block.fence.split()[:1] == ["python"]]


def run(snippet, namespace):
    """Run a snippet in ``namespace``, as it is printed. Comment lines after a ``print`` are what it must print. Line
    breaks need not be the same."""
    lines = snippet.text.splitlines()
    tree = ast.parse(snippet.text)
    for statement in tree.body:
        after = lines[statement.end_lineno:]
        printed = io.StringIO()
        module = ast.increment_lineno(ast.Module([statement], []), snippet.line - 1)
        with contextlib.redirect_stdout(printed):
            exec(compile(module, snippet.page, "exec"), namespace)
        if ast.unparse(statement).startswith("print(") and after and after[0].startswith("# "):
            want = " ".join(line[1:] for line in _while(lambda line: line.startswith("#"), after))
            assert printed.getvalue().split() == want.split(), f"{snippet} prints {printed.getvalue()}"


def _while(condition, lines):
    for line in lines:
        if not condition(line):
            return
        yield line


def look_up(snippet):
    """Compile a snippet and look up what it names of triton_lstm. Raises what that raises."""
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "triton_lstm":
            for alias in node.names:
                getattr(importlib.import_module(node.module), alias.name)
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"triton_lstm(\.\w+)+", ast.unparse(node)):
            pkgutil.resolve_name(ast.unparse(node))


def code(page):
    """All code of a document that is not Python: lines of blocks, and what stands between backticks, each on a line."""
    text = []
    for block in blocks(page):
        if block.fence is None:
            text.append(block.text)
        elif not block.fence.startswith("python"):
            yield from block.text.splitlines()
    for paragraph in "\n".join(text).split("\n\n"):
        if paragraph.startswith("    "):
            yield from map(str.strip, paragraph.splitlines())
        else:
            yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", paragraph))


def commands(page, program):
    """The arguments, as text, of each time that a document names ``python -m program`` or the like."""
    for line in code(page):
        for part in re.split(r"&&|\s#\s", line):
            if match := re.fullmatch(re.escape(program) + r"(?:\s+(.*))?", part.strip()):
                yield match[1] or ""
