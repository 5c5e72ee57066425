"""Builds the pages of the project and an API reference as HTML files: ``python -W error .ci/docs.py FOLDER``.

Pages are the Markdown files of the repository. The reference is made of docstrings, by pdoc, and has what is public:
the modules of MODULES with the names in their ``__all__``. A link that leads nowhere raises ValueError.
"""
import html.parser
import importlib
import pathlib
import posixpath
import re
import sys
import types
import warnings

import pdoc
import pdoc.render_helpers

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = {
    "index": "README.md", "recipes": "triton_lstm/RECIPES.md", "reinforcement_learning": "triton_lstm/rl/README.md",
    "tuning": "triton_lstm/TUNING.md", "troubleshooting": "triton_lstm/TROUBLESHOOTING.md",
    "limits": "triton_lstm/LIMITS.md", "how_it_works": "kernels/README.md", "benchmark": "bench/README.md",
    "machine_code": "bench/MACHINE_CODE.md", "notes": "bench/NOTES.md", "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md"}
MODULES = ["triton_lstm", "triton_lstm.backends", "triton_lstm.plan", "triton_lstm.rl", "triton_lstm.rl.sb3",
           "triton_lstm.rl.torchrl"]
FULL = 108      # characters of a line of a docstring, without its indentation, to which another word was not added


def page(name, path):
    """A page as a module of pdoc."""
    file = ROOT / path
    module = types.ModuleType(name)
    module.__file__ = str(file)             # pictures are looked up beside it
    module.__docformat__ = "markdown"
    text = file.read_text()
    module.title = text.partition("\n")[0].removeprefix("# ")
    module.__doc__ = re.sub(r"^```(\w+) .*$", r"```\1", relinked(text, path), flags=re.M)
    module.__all__ = []
    found = pdoc.doc.Module(module)
    found.source = ""
    return found


def relinked(text, path):
    """The text of the document ``path``, whose links to other documents are links to their pages."""
    names = {document: name for name, document in PAGES.items()}

    def relink(match):
        target, anchor = match.groups()
        document = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        return f"]({names[document]}.html{anchor or ''})" if document in names else match[0]
    return re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", relink, text)


def reference(name):
    """A module with its public names, as pdoc's Module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of the libraries that it imports
        found = pdoc.doc.Module(importlib.import_module(name))
    found.docstring = with_lists(found.docstring)
    found.submodules = []                   # the start page lists all modules
    found.members = dict(sorted(found.members.items(), key=lambda item: item[1].kind == "variable"))
    for member in found.members.values():
        member.docstring = with_lists(member.docstring)
        if member.kind == "class":
            member.bases = [base for base in member.bases if not base[1].startswith("_")]
            member.inherited_members = {}
            for of_class in member.members.values():
                of_class.docstring = with_lists(of_class.docstring) if shown(of_class) else "@private"
                if of_class.name == "__init__" and not of_class.obj.__doc__:
                    of_class.docstring = ""     # otherwise that of the class above
    return found


def shown(member):
    """Whether the reference has a member of a class."""
    if not member.taken_from[0].startswith("triton_lstm"):
        return False                            # of torch's classes
    if member.kind == "function":
        return bool(member.obj.__doc__) or member.name == "__init__"
    return bool(member.annotation_str or member.docstring) and not member.docstring.startswith("Alias for field")


def with_lists(docstring):
    """A docstring whose tables of arguments, with names and text in two columns, are Markdown lists."""
    return "\n\n".join(as_list(paragraph.splitlines()) or paragraph for paragraph in docstring.split("\n\n"))


def as_list(lines):
    """The lines of a table as a Markdown list; None if they are no table.

    The text of the first row begins at a column. A line that has something before that column is a row, others go on
    with the row before. Where a line ends early, the list breaks it too.
    """
    if not lines or not (first := re.match(r"(\S.*?)(  +)(?=\S)", lines[0])):
        return None
    column, items, before = first.end(), [], ""
    for line in lines:
        if line[:column].strip():
            row = re.match(r"(\S.*?)  +(\S.*)", line) or re.match(rf"(\S.{{{column - 2}}}) (\S.*)", line)
            if not row:
                return None
            items.append(f"- **`{row[1].strip(' `')}`** {row[2]}")
        elif items and line.strip():
            full = len(before) + 1 + len(line.split()[0]) > FULL
            items[-1] += (" " if full else "  \n  ") + line.strip()
        before = line
    return "\n".join(items)


class Links(html.parser.HTMLParser):
    """The links and the anchors of an HTML file."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.links.append(attributes["src"])


def check_links(folder):
    """Raise ValueError if a link inside ``folder`` leads nowhere."""
    found = {file: Links(file.read_text()) for file in folder.rglob("*.html")}
    for file, of in found.items():
        for link in of.links:
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            if not re.match(r"\w+:", link) and (
                    target not in found or anchor and anchor not in found[target].anchors):
                raise ValueError(f"{file.relative_to(folder)} has a link to {link}, which is not there")


def build(folder):
    """Write all files into ``folder``."""
    pdoc.render.configure(template_directory=ROOT / ".ci" / "templates", search=False)
    # as GitHub calls headings
    pdoc.render_helpers.markdown_extensions["header-ids"] = {"prefix": None, "reset-count": True}
    modules = {name: page(name, path) for name, path in PAGES.items()}
    modules.update({name: reference(name) for name in MODULES})
    modules["index"].docstring += "\n## API reference\n\n" + "".join(
        f"- [`{name}`]({name.replace('.', '/')}.html) {modules[name].docstring.partition(chr(10))[0]}\n"
        for name in MODULES)
    for name, module in modules.items():
        file = folder / (name.replace(".", "/") + ".html")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pdoc.render.html_module(module, modules))
    check_links(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.path.insert(0, str(ROOT))
    build(pathlib.Path(sys.argv[1]).resolve())
