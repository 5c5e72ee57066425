"""The benchmark without a GPU: machine code, residency, training, the command line, and ``verify``."""
import collections
import csv
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time
from unittest import mock

import pytest
import torch
from triton_lstm.kernels.launch import BEFORE_LOOPS
from triton_lstm.kernels.offline import compile_plan

import harness
from bench import __main__ as command
from bench import console, correctness, machine_code, residency, train, verify
from bench.workloads import DTYPES, WORKLOADS
from problems import PORTABLE
from triton_lstm import make_plan
from triton_lstm.kernels import precision
from triton_lstm.plan import H200

ROOT = pathlib.Path(__file__).parents[1]


class Wrong(torch.nn.LSTM):
    """An LSTM whose y is wrong by a tenth."""
    def forward(self, x, hx=None):
        y, state = super().forward(x, hx)
        return 1.1 * y, state


# Machine code

def sass(*instructions):
    """What cuobjdump prints for instructions, each (text, stall, wr, rd, mask of scoreboards to wait for)."""
    line = "        /*{:04x}*/         {:>40} ;  /* 0x0000000000000000 */\n                  /* 0x{:016x} */\n"
    return "".join(line.format(16 * n, text, (stall | wr << 5 | rd << 8 | wait << 11) << 41)
                   for n, (text, stall, wr, rd, wait) in enumerate(instructions))


def test_parse_reads_instructions_and_control_bits():
    code = machine_code._parse(sass(
        ("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", 4, 2, 0, 0), ("FADD R1, R4, R1", 5, 7, 7, 0b100),
        ("@UP0 BAR.SYNC.DEFER_BLOCKING 0x0", 1, 7, 7, 0), ("EXIT", 5, 7, 7, 0)))
    assert [(i.address, i.op, i.stall, i.wr, i.rd, i.wait) for i in code] == [
        (0, "LDG", 4, 2, 0, 0), (16, "FADD", 5, 7, 7, 0b100), (32, "BAR", 1, 7, 7, 0), (48, "EXIT", 5, 7, 7, 0)]
    assert code[0].full == "LDG.E.128" and code[0].operands == "R4, desc[UR4][R2.64]"


@pytest.mark.parametrize("text, registers", [
    ("LDSM.16.M88.4 R4, [R2]", [4, 5, 6, 7]), ("LDS.64 R4, [R2]", [4, 5]), ("FADD R4, R5, R6", [4]),
    ("@!P0 IMAD.WIDE R4, R5, 0x4, R6", [4, 5]), ("FFMA2 R4, R6, R8, R10", [4, 5]), ("SHFL.BFLY PT, R4, R5, 0x1", [4]),
    ("HMMA.16816.F32 R4, R8, R12, R4", [4, 5, 6, 7]), ("STS.128 [R2], R4", []), ("ISETP.GE.AND P0, PT, R4, R5", []),
    ("STG.E desc[UR4][R2.64], R4", []), ("UMOV UR4, 0x1", []), ("EXIT", []), ("IADD3 R4, P0, R5, R6, RZ", [4])])
def test_registers_written(text, registers):
    assert list(machine_code._written(*machine_code._parse(sass((text, 1, 7, 7, 0))))) == registers


def test_held_operands_are_those_that_the_loop_does_not_write():
    parse = lambda lines: machine_code._parse(sass(*((line, 1, 7, 7, 0) for line in lines)))
    held = lambda *lines: machine_code._held(parse(lines), warps=8)
    product, tf32 = "HMMA.16816.F32.BF16 R0, R8, R12.reuse, R0", "HMMA.1688.F32.TF32 R0, R8, R14, RZ"
    pair = 2 * 4 * 32 * 8           # bytes of two registers of every thread
    assert held(product) == held(product, product) == pair and held(product, tf32) == 2 * pair
    assert held("HMMA.1688.F32.BF16 R0, R8, R12, R0") == pair // 2
    assert held("LDSM.16.M88.4 R12, [R20]", product, tf32) == 0
    assert held("LDS R13, [R20]", product) == pair // 2
    assert held("FADD R1, R12, R13") == 0


def test_loops_nest_and_are_bounded():
    outer, inner = machine_code._loops(machine_code._parse(sass(
        ("MOV R1, RZ", 1, 7, 7, 0),
        ("LDG.E R4, [R2]", 2, 0, 7, 0),                         # begin of the outer loop
        ("STL [R1], R4", 1, 7, 7, 1),
        ("MUFU.TANH R4, R4", 1, 1, 7, 0),                       # begin of the inner loop
        ("@P0 BRA 0x30", 5, 7, 7, 0),
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 1, 2, 7, 0b10),
        ("BRA.U UP0, 0x10", 5, 7, 7, 0),
        ("BRA 0x70", 0, 7, 7, 0))), warps=8, arch=90)          # a branch to itself ends every kernel, and is no loop
    assert (outer.start, outer.end, inner.start, inner.end) == (0x10, 0x60, 0x30, 0x40)
    assert outer.counts == collections.Counter(LDG=1, STL=1, MUFU=1, BRA=2, HMMA=1) and outer.spills == 1
    report = machine_code.Report(32, 0, 0, (outer, inner))
    assert report.time_loop is outer and report.inside(outer) == [inner] and report.inside(inner) == []
    # two warps on each scheduler; a matrix product of 2048 multiply-adds at 320 a cycle
    assert (outer.instructions, outer.issue, outer.tensor, outer.mufu) == (6, 12, 2 * 2048 / 320, 2 * 8)
    # LDG takes 263 cycles, for which STL waits. MUFU starts at 264 and ends at 287, for which HMMA waits.
    assert outer.chain == 263 + 1 + 23 + 1 + 5 == outer.bound


@pytest.mark.parametrize("name, arch, cycles", [
    ("HMMA.16816.F32", 90, 6.4), ("HMMA.16816.F32.BF16", 80, 8), ("HMMA.1688.F32.TF32", 90, 6.4),
    ("HGMMA.64x128x16.F32.BF16", 90, 64), ("FFMA", 90, 0)])
def test_tensor_cycles(name, arch, cycles):
    instruction = machine_code._Instruction(0, name.split(".")[0], name, "", 0, 7, 7, 0)
    assert machine_code._tensor_cycles(instruction, arch) == pytest.approx(cycles)


@pytest.mark.parametrize("schedule, hidden_size, arch", [("resident", 64, 80), ("resident", 64, 90), ("grid", 128, 90),
                                                        ("grid", 128, 100)])
def test_read_a_plan(arch, schedule, hidden_size):
    limits = H200 if schedule == "resident" else PORTABLE
    plan = make_plan(16, hidden_size, torch.float16, schedule=schedule, limits=limits)
    for name, kernel in compile_plan(plan, torch.float16, arch).items():
        report = machine_code.read(kernel)
        loop = report.time_loop
        assert report.stack == 0 and loop.spills == 0 and 16 <= report.registers <= 255
        assert report.shared == kernel.metadata.shared
        assert loop.bound >= loop.chain > 0 and loop.issue == loop.instructions * plan.num_warps / 4
        # every product of a step once: 16 rows, 4 gates, m16n8k16
        units = hidden_size if schedule == "resident" else plan.block_h
        products = 0 if name in BEFORE_LOOPS else 16 * 4 * units * hidden_size // (16 * 8 * 16) // plan.num_warps
        assert loop.counts["HMMA"] == products
        assert loop.held == (plan.held_bytes if products else 0)
        assert loop.counts["STG"] > 0 and (loop.counts["MUFU"] > 0) == (not name.startswith("backward"))
        # the loop of a wait does not count, because a pass finds what is sent at the first look
        assert not any(other.counts["LDG"] for other in report.inside(loop))
        machine_code._read.cache_clear()
        assert machine_code.read(kernel) == report


# Residency

def test_residency_compiles_shared_plans_once_and_tells_why_one_has_none(capsys):
    deepar = next(w for w in WORKLOADS if w.name == "deepar")
    huge = dataclasses.replace(deepar, name="huge", hidden_size=10 ** 5)
    with mock.patch.object(residency, "compile_plan", wraps=compile_plan) as compiled:
        found = residency.read_plans([deepar, dataclasses.replace(deepar, name="twin", steps=7), huge])
    assert compiled.call_count == 1 and "[1/1]" in capsys.readouterr().err
    assert found[0].forward is found[1].forward is not None and found[2].plan is None
    lines = residency.table(found).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    row = dict(zip(cells[0], cells[2]))
    assert row["workload"] == "deepar" and row["schedule"] == "resident" and row["spills"] == "0 / 0"
    planned = f"{found[0].plan.held_bytes / 1024:.0f}"
    assert row["R planned"] == planned and row["R from L2"] == "0"
    assert row["R in registers"].endswith(f" / {planned}")      # forward has less padding
    assert row["registers"] == f"{found[0].forward.registers} / {found[0].backward.registers}"
    assert cells[4][:3] == ["huge", "fp32", "no plan"] and re.match("huge: .*multiprocessors", lines[5])


def test_step_cycles_counts_tiles_and_the_streamed_part():
    loop = lambda start, end, cycles, op: machine_code.Loop(start, end, collections.Counter([op]), 0, 0, 0, 0, cycles)
    outer, stream, spin = loop(0, 99, 1000, "HMMA"), loop(10, 20, 700, "HMMA"), loop(30, 40, 500, "LDG")
    report = machine_code.Report(255, 0, 0, (outer, stream, spin))
    plan = make_plan(32, 2048, torch.bfloat16, limits=PORTABLE)
    passes = -(-(2048 - plan.held) // plan.block_k)
    assert plan.schedule == "streamed" and passes > 1
    assert residency.step_cycles(plan, report) == plan.tiles * (1000 + 700 * (passes - 1))
    slow = dataclasses.replace(report, loops=(loop(0, 99, 10, "HMMA"),))       # L2 takes longer than instructions
    assert residency.step_cycles(plan, slow) == plan.tiles * plan.streamed_bytes / 64
    assert residency.step_cycles(make_plan(16, 64, torch.bfloat16), report) == 1000


def test_progress_tells_the_time_left(capsys):
    assert list(console.progress("ab")) == ["a", "b"]
    assert re.fullmatch(r"\[1/2\] a\n\[2/2\] b, \d+ s left\n", capsys.readouterr().err)


def test_an_error_that_is_not_a_number_passes_no_bound():
    one, zero = dict(y=torch.ones(2)), dict(y=torch.zeros(2))
    assert correctness.error(zero, dict(y=torch.zeros(2).double())) == 0
    assert not correctness.error(dict(y=torch.tensor([1., float("nan")])), dict(y=torch.ones(2).double())) <= 1e9
    assert correctness.error(one, dict(y=torch.zeros(2).double())) > 1e9


# Training

def test_training_gives_the_same_losses(tmp_path):
    """Runs the whole command. Without a GPU it starts itself again with the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "bench", "train", "--steps", "6", "--hidden", "20", "--sequence", "8",
                           "--layers", "2", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**environment, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    torchs, ours = map(float, re.findall(r"final loss (\S+)", done.stdout))
    difference = float(re.search(r"largest difference between the loss curves: (\S+)", done.stdout)[1])
    # Both are in fp32. Over six steps Adam amplifies differences in the last bit.
    assert 3 < ours < 5.6 and abs(ours - torchs) <= 1e-5 and difference <= 1e-5
    assert "interpreter" in done.stdout and "characters/s" not in done.stdout + done.stderr
    assert "[6/6] loss" in done.stderr
    harness.assert_drawn(tmp_path / "train.png")


def test_training_on_a_gpu(tmp_path, capsys):
    """As on a GPU, speeds are printed and drawn. Here both layers run torch's LSTM on the CPU."""
    sizes, real = train.Sizes(2, 4, 8, 3), train.train
    assert list(real(sizes, 1, 0, torch.float32, "cpu")[0]) == list(train.LAYERS)
    with mock.patch.object(train, "train", lambda *args: real(*args[:-1], "cpu")), \
            mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"):
        assert train.run(tmp_path, sizes) == 0
    assert len(re.findall(r"final loss \S+, \S+ characters/s", capsys.readouterr().out)) == 2
    harness.assert_drawn(tmp_path / "train.png")


def test_interrupted_training_keeps_equal_curves(tmp_path):
    steps = mock.Mock(side_effect=[5., 5., 4., KeyboardInterrupt])
    with mock.patch.object(train.Trainer, "step", steps):
        losses, _ = train.train(train.Sizes(2, 4, 8, 9), 1, 0, torch.float32, "cpu")
    assert losses == {name: [5.] for name in train.LAYERS}


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_reduces_the_loss_in_every_type(dtype):
    """The loss begins at about log(256), as there are 256 characters. Both layers run torch's LSTM on the CPU."""
    losses, _ = train.train(train.Sizes(8, 16, 32, 20), 1, 0, correctness.dtype_of(dtype), "cpu")
    first, second = losses.values()
    assert first == second and 5.3 < first[0] < 5.8 and first[-1] < first[0] - 0.5


def test_16_bit_weights_follow_copies_in_fp32():
    torch.manual_seed(0)
    model = train.Model(torch.nn.LSTM, 8, 1).half()
    trainer, before = train.Trainer(model), [w.clone() for w in model.parameters()]
    trainer.step(torch.randint(256, (5, 2)))
    # Adam's first step has the size of the learning rate, whatever the scale of the loss is
    assert max((a - b).abs().max().item() for a, b in zip(model.parameters(), before)) == pytest.approx(2e-3, rel=0.3)
    for copy, weight in zip(trainer.copies, model.parameters()):
        assert copy.dtype == torch.float32 and torch.equal(copy.half(), weight)


def test_text_and_batches_are_the_same_each_time():
    text, sizes = train.read_text(), train.Sizes(3, 5, 8, 2)
    assert len(text) > 10 ** 6 and torch.equal(text, train.read_text())
    first, again, other = (list(train.batches(text, sizes, seed)) for seed in (1, 1, 2))
    assert len(first) == 2 and first[0].shape == (6, 3)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])


# The command line

def test_command_without_a_gpu_says_so_and_passes_the_check_on(tmp_path, capsys):
    for code in (0, 1):
        with mock.patch.object(torch.cuda, "is_available", return_value=False), \
                mock.patch.object(command.subprocess, "run") as checked, \
                mock.patch.object(residency, "show") as shown, mock.patch.object(command, "plot") as plotted:
            checked.return_value.returncode = code
            assert command.main(["--out", str(tmp_path)]) == code
        checked.assert_called_once()
        assert checked.call_args.args[0][1:] == ["-m", "triton_lstm", "check", "--kind", "portable resident"]
        shown.assert_called_once_with(WORKLOADS)
        plotted.assert_called_once_with([], tmp_path)
        assert "nothing is timed" in capsys.readouterr().out


def test_command_with_a_gpu_sweeps(tmp_path):
    with mock.patch.object(torch.cuda, "is_available", return_value=True), \
            mock.patch.object(command, "sweep", return_value=1) as swept:
        assert command.main(["--out", str(tmp_path), "--quick", "--dtype", "bf16"]) == 1
    args = swept.call_args.args[0]
    assert (args.out, args.amount, args.dtype, args.workload) == (tmp_path, "quick", ["bf16"], None)


def test_command_line_is_explained(capsys):
    for arguments in ([], ["residency"], ["train"], ["plot"], ["compare"], ["verify"], ["loops"], ["fit"]):
        with pytest.raises(SystemExit) as stop:
            command.main([*arguments, "--help"])
        assert stop.value.code == 0 and "usage: python -m bench" in capsys.readouterr().out
    args = command.parser().parse_args(["--out", "a", "train", "--steps", "3"])
    assert args.out == pathlib.Path("a") and args.steps == 3
    for wrong in (["train", "--steps", "0"], ["--quick", "--full"], ["--dtype", "fp8"]):
        with pytest.raises(SystemExit):
            command.parser().parse_args(wrong)


def test_nothing_compiles_in_the_interpreter():
    with mock.patch.object(precision, "INTERPRET", True), pytest.raises(SystemExit):
        command.main(["residency"])


# The two calls on a GPU

def test_verify_reports_whatever_fails_and_stops_what_takes_too_long(tmp_path, capsys):
    child = tmp_path / "child"
    python = lambda code: [sys.executable, "-c", code]
    steps = [("good part", python("import os; print('all well', os.environ['EXTRA'])"), 30, dict(EXTRA="so far")),
             ("bad part", python("import sys; print('alas'); sys.exit(3)"), 30, {}),
             ("slow part", ["sh", "-c", f"(sleep 3; touch {child}) & sleep 60"], 1, {}),
             ("last part", python("print('the end')"), 30, {})]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "picture.png").touch()
    began = time.monotonic()
    assert verify.verify(tmp_path / "out", steps) == 1 and time.monotonic() - began < 30
    text = (tmp_path / "out" / "report.md").read_text()
    for line in ("## good part: ok", "all well so far", "## bad part: exit code 3", "alas",
                 "## slow part: stopped after 1 s", "## last part: ok", "the end", "![picture.png](picture.png)"):
        assert line in text
    assert verify.verify(tmp_path / "out", steps[:1]) == 0
    time.sleep(max(0, began + 5 - time.monotonic()))
    assert not child.exists()           # the child of the slow part was stopped too


def test_verify_begins_nothing_when_its_time_is_over(tmp_path):
    now = iter(range(0, 1000, 100))
    steps = [(name, [sys.executable, "-c", "print('ran')"], 500, {}) for name in ("one", "two", "three")]
    assert verify.verify(tmp_path, steps, seconds=250, clock=lambda: next(now)) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## one: ok" in text and "## two: not begun" in text and "## three: not begun, 250 s are over" in text


def test_few_files_are_left(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.log").write_text(f"log {n}")
        (tmp_path / f"{n}.png").write_bytes(b"png")
    for name in ("report.md", "check.jsonl", "loops.csv"):
        (tmp_path / name).write_text(name)
    with mock.patch.object(verify, "MOST_BYTES", 100):
        (tmp_path / "large.csv").write_bytes(b"0" * 200)
        verify.pack(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"report.md", "check.jsonl", "loops.csv", "0.png", "1.png", "2.png", "3.png", "rest.tar.gz"}
        assert len(left) == verify.MOST_FILES
        (tmp_path / "0.log").write_text("log anew")
        verify.pack(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left
    with tarfile.open(tmp_path / "rest.tar.gz") as packed:
        assert sorted(packed.getnames()) == ["0.log", "1.log", "2.log", "3.log", "4.log", "4.png", "5.log", "5.png",
                                             "large.csv"]
        assert packed.extractfile("0.log").read() == b"log anew" and packed.extractfile("3.log").read() == b"log 3"


def test_verify_covers_what_it_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(verify.shutil, "which", lambda name: f"/bin/{name}")
    parts = list(verify.first(tmp_path))
    assert [name for name, *_ in parts] == ["environment", "check", "loops"] + [
        f"{what} of {kind}" for kind in ("resident", "split", "wgmma") for what in ("memcheck", "racecheck", "profile")]
    outcome, good = verify.run_part(parts[0][1], 120, tmp_path / "log")
    assert good and outcome == "ok" and f"torch {torch.__version__}" in (tmp_path / "log").read_text()
    names = [name for name, *_ in verify.first(tmp_path, tmp_path / "triton")]
    assert names.index("check with the second Triton") > names.index("loops")
    recorded = list(verify.record(tmp_path))
    assert [name for name, *_ in recorded] == ["GPU tests", "sweep", "other GPU tests"]
    (tmp_path / "2026-01-01.csv").touch()
    assert "pictures" in [name for name, *_ in verify.record(tmp_path)]
    for _, words, _, environment in verify.first(tmp_path, tmp_path / "triton"):
        if "bench" in words:            # the command line accepts them
            command.parser().parse_args(words[3:])
        assert not environment or environment["PYTHONPATH"].startswith(str(tmp_path / "triton"))
    for _, words, _, _ in recorded:
        if "bench" in words:
            command.parser().parse_args(words[3:])


def test_host_times_in_the_notes():
    """They are the least of the runs that were kept."""
    least = {}
    with open(command.RESULTS / "host.csv", newline="") as file:
        for row in csv.DictReader(file):
            for loop in ("forward", "backward"):
                if row[f"{loop}_least_us"]:
                    least.setdefault((row["workload"], loop), []).append(int(row[f"{loop}_least_us"]))
    text = (pathlib.Path(command.__file__).parent / "NOTES.md").read_text().split("## Host time of a call")[1]
    told = {}
    for name, forward, backward in re.findall(r"^\| (\w+) \| \d+ \| (\d+) \| \d* \| (\d*) \|$", text, re.M):
        told[name, "forward"] = int(forward)
        if backward:
            told[name, "backward"] = int(backward)
    assert len(told) > 40 and told == {key: min(least[key]) for key in told}
