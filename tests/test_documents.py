"""The documents: snippets run as printed, command lines exist, and every warning is explained. The script that
builds the pages checks their links."""
import ast
import contextlib
import importlib.util
import inspect
import logging
import pkgutil
import re
import shlex
import socket

import pytest
import torch

import documents
import harness
import triton_lstm
import triton_lstm.__main__
import triton_lstm.rl
from bench.__main__ import parser as bench_parser
from documents import DOCUMENTS, ROOT, name

SOURCES = sorted([*(ROOT / "triton_lstm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
# Those of reinforcement learning need fixtures of the libraries: test_rl.py runs them.
ELSEWHERE = ROOT / "triton_lstm" / "rl" / "README.md"
PAGES = [page for page in DOCUMENTS if documents.snippets(page) and page != ELSEWHERE]
ALL = [snippet for page in DOCUMENTS for snippet in documents.snippets(page)]


def missing(snippet):
    """What a snippet needs and is not here."""
    return [need for need in snippet.needs if not (
        torch.cuda.is_available() if need == "gpu" else importlib.util.find_spec(need))]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder, a cache and a process of the reader's own, as torchrun starts one. Switches are restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_LSTM_CACHE", str(tmp_path / "cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for variable, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(triton_lstm.backends, "benchmark", False)
    limit, level = triton_lstm.set_wait_limit(10), logging.getLogger("triton_lstm").level
    yield
    triton_lstm.set_wait_limit(limit)
    logging.getLogger("triton_lstm").setLevel(level)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page, where", [(page, where) for page in PAGES for where in ("kernels", "torch")
                                         if page.name != "CONTRIBUTING.md" or where == "torch"], ids=lambda x: (
                                             x if isinstance(x, str) else name(x)))
@pytest.mark.filterwarnings("ignore", "error:triton_lstm")     # torch warns of its own jit, ONNX export and FSDP2
def test_snippets_run_as_printed(page, where, reader):
    """In order, in one namespace. On a GPU "kernels" is the GPU. The page for contributors brings an emulator."""
    natively = harness.interpreter() if where == "kernels" and not torch.cuda.is_available() else None
    namespace = {"__name__": "__main__"}
    with natively or contextlib.nullcontext():
        for snippet in documents.snippets(page):
            if not missing(snippet):
                documents.run(snippet, namespace)


@pytest.mark.parametrize("snippet", ALL, ids=str)
def test_names_of_snippets(snippet):
    absent = missing(snippet)
    try:
        documents.look_up(snippet)
    except ImportError:         # a module of triton_lstm.rl without its library
        if not absent:
            raise
    if absent:
        pytest.skip(f"it was compiled and its names were looked up, but it did not run: it needs {', '.join(absent)}")


def test_what_is_printed_is_compared():
    page = ROOT / "README.md"
    documents.run(documents.Block(page, 1, "", "python", "print('a b',\n      1)\n# a\n# b 1\nx = 1\n"), {})
    with pytest.raises(AssertionError, match="README.md:1 prints a"):
        documents.run(documents.Block(page, 1, "", "python", "print('a')\n# b\n"), {})


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_command_lines(page, capsys):
    """Each names a command with options that exist."""
    for program, parser in (("python -m triton_lstm", triton_lstm.__main__.parser()),
                            ("python -m bench", bench_parser())):
        for arguments in documents.commands(page, program):
            try:
                parser.parse_args(shlex.split(arguments))
            except (SystemExit, ValueError):
                pytest.fail(f"{program} {arguments}: {capsys.readouterr().err}")
    for arguments in documents.commands(page, "python -m pytest"):
        for test in re.findall(r"\S+\.py\S*", arguments):
            exists(ROOT / test.split("::")[0], test)
    for script in re.findall(r"^python (\S+\.py)", "\n".join(documents.code(page)), re.M):
        exists(ROOT / script, script)
    for arguments in documents.commands(page, "pip install"):
        for extra in re.findall(r"\.\[(\w+)]", arguments):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), extra
    for test in re.findall(r"test_\w+\.py(?:::\w+)?", page.read_text()):
        exists(ROOT / "tests" / test.split("::")[0], test)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_names_in_the_text(page):
    for code in documents.code(page):
        for found in re.findall(r"\btriton_lstm(?:\.[a-zA-Z_]\w*)+", code):
            if not found.startswith(("triton_lstm.rl.sb3", "triton_lstm.rl.torchrl")):      # which need libraries
                pkgutil.resolve_name(found)


def test_environment_variables():
    """The documents name those that the package reads, and no others."""
    variables = lambda files: {variable for file in files for variable in re.findall(r"TRITON_LSTM_[A-Z_]+",
                                                                                     file.read_text())}
    assert variables(DOCUMENTS) == variables(SOURCES)


def exists(file, test):
    """Assert that a file exists, and the function that ``test`` names in it."""
    assert file.is_file(), test
    if "::" in test:
        assert f"def {test.split('::')[1]}(" in file.read_text(), test


@pytest.fixture
def docs():
    """The script that builds the pages."""
    pytest.importorskip("pdoc", reason="pip install pdoc")
    spec = importlib.util.spec_from_file_location("docs", ROOT / ".ci" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_document_is_a_page(docs):
    assert {ROOT / path for path in docs.PAGES.values()} == set(DOCUMENTS)


def test_links_between_pages(docs, tmp_path):
    assert docs.relinked("[a](TUNING.md#time) [b](../kernels/README.md) [c](#d) [e](https://f.g/h) [i](j.png)",
                         "triton_lstm/RECIPES.md") == (
        "[a](tuning.html#time) [b](how_it_works.html) [c](#d) [e](https://f.g/h) [i](j.png)")
    (tmp_path / "a.html").write_text('<h1 id="b">b</h1><a href="https://c.d">c</a><a href="#b">b</a>')
    (tmp_path / "e.html").write_text('<a href="a.html#b">b</a>')
    docs.check_links(tmp_path)
    for dead in ("a.html#c", "b.html", "#a"):
        (tmp_path / "e.html").write_text(f'<a href="{dead}">b</a>')
        with pytest.raises(ValueError, match=f"e.html has a link to {dead}"):
            docs.check_links(tmp_path)


def test_tables_of_docstrings(docs):
    full = "text of a line that is as long as that of a docstring can be, so that the next word is one of"
    table = ["x        (T, B), or", "         (B, T)", f"lengths  {full}", "         another line", "long_name  text",
             "one_more with one blank"]
    assert docs.as_list(table).splitlines() == [
        "- **`x`** (T, B), or  ", "  (B, T)", f"- **`lengths`** {full} another line", "- **`long_name`** text",
        "- **`one_more`** with one blank"]
    assert docs.as_list(["Returns y.", "    indented"]) is None


def test_docstrings_name_the_arguments(docs):
    """What a public function's table explains is an argument. Those of ``lstm`` are all explained, in their order."""
    tables = 0
    public = [getattr(triton_lstm, attribute) for attribute in triton_lstm.__all__]
    for function in [*public, triton_lstm.rl.run_episodes, triton_lstm.LSTM.forward, triton_lstm.LSTM.step]:
        if inspect.isfunction(function):
            rows = re.findall(r"^- \*\*`(.*?)`", docs.with_lists(inspect.getdoc(function)), re.M)
            explained = [argument for row in rows for argument in row.split(", ")]
            arguments = list(inspect.signature(function).parameters)
            assert set(explained) <= set(arguments), function
            assert function is not triton_lstm.lstm or explained == arguments
            tables += bool(explained)
    assert tables >= 8


def said(node):
    """The text of an expression, with "…" for what is not constant in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(said, node.values))
    if isinstance(node, ast.BinOp):
        return said(node.left) + said(node.right)
    return "…"


def messages():
    """(where, text) of each warning and each RuntimeError of the package, and of each reason for which torch's own LSTM
    computes."""
    reasons = {"none_on", "too_large_together", "_torch_is_faster"}     # functions that return them
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.FunctionDef) and node.name in reasons:
                reasons.discard(node.name)
                found = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "warnings.warn", "log.warning", "RuntimeError", "LSTM._no", "self._no"):
                found = node.args[:1]
            for value in found:
                for text in map(said, (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)):
                    if text.strip("…"):
                        yield f"{name(path)}:{node.lineno}", " ".join(text.replace("%s", "…").split())
    assert not reasons, f"there is no function {reasons}"


def test_every_warning_is_explained():
    """The page quotes the beginning of each, and each by a quotation of its own."""
    quoted = {quotation.rstrip(" …") for quotation in documents.code(ROOT / "triton_lstm" / "TROUBLESHOOTING.md")}
    quoted = {quotation for quotation in quoted if len(quotation.split()) > 2 or quotation.startswith("LSTMCell in")}
    explained, found = {}, list(messages())
    assert len(found) > 20
    for where, text in found:
        by = max((quotation for quotation in quoted if text.startswith(quotation)), key=len, default=None)
        assert by is not None, f"{where} is not explained: {text}"
        assert explained.setdefault(by, text) == text, f"{where} and another message are both explained by {by!r}"
