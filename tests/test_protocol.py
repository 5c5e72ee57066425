"""How programs that share R wait for each other: right in many interleavings, and tests notice a broken wait."""
import contextlib
import dataclasses
import re
import sys
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

import harness
from problems import NotFinite, Problem, error
from ptx_emulator import Deadlock

exchange = sys.modules[f"{harness.interpreted_launch.__package__}.exchange"]
any_bit, is_missing, missing, send = exchange.any_bit, exchange.is_missing, exchange.missing, exchange.send
send_shares, add_shares = exchange.send_shares, exchange.add_shares
PROBLEM = Problem(3, 3, 2, 33)          # three programs that exchange h, two chunks of steps


def plan(problem, tiles=1):
    plan = problem.shared_plan("grid")
    return dataclasses.replace(plan, groups=-(-problem.B // (16 * tiles)), tiles=tiles)


@pytest.mark.parametrize("seed", range(40))
def test_interleaved(seed):
    with harness.interleaved(seed):
        PROBLEM.check(PROBLEM.ours(plan=plan(PROBLEM)))


@pytest.mark.parametrize("seed", range(12))
def test_interleaved_groups_of_two_tiles(seed):
    problem = Problem(3, 33, 2, 20)
    with harness.interleaved(seed):
        problem.check(problem.ours(plan=plan(problem, tiles=2)))


@contextlib.contextmanager
def broken(name, function):
    """Inside, interpreted kernels have ``function`` in the place of the function ``name`` of the module
    ``exchange``."""
    with harness.interpreting():
        replaced = triton.jit(function)
    package = harness.interpreted_launch.__package__
    modules = [sys.modules[f"{package}.{module}"] for module in ("exchange", "portable_forward", "portable_backward")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, replaced))
        yield


def nothing_is_missing(words, dtype: tl.constexpr):
    return False


def half_is_enough(words, dtype: tl.constexpr):
    first = tl.where(tl.arange(0, words[0].shape[1])[None, :] < words[0].shape[1] // 2, words[0], 0)
    return is_missing(any_bit(missing(first, dtype)), dtype)


def always_one(turn):
    return 1 + 0 * turn


def not_flagged(ptr, shares, flag, INTERPRET: tl.constexpr):
    low, high = shares.to(tl.int32, bitcast=True).reshape(shares.shape[0], shares.shape[1] // 2, 2).split()
    send(ptr, low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32), INTERPRET)


@pytest.mark.parametrize("name, function, at_least", [("any_missing", nothing_is_missing, 4),
                                                      ("any_missing", half_is_enough, 1), ("flag_of", always_one, 2)])
def test_interleaving_catches_a_missing_wait(name, function, at_least):
    """Without a wait, most interleavings give wrong results. With half a wait, those do in which a program overtakes
    the last one. With a flag that never changes, those do in which a program finds shares of four steps before."""
    problem = Problem(5, 3, 2, 33)
    exact, wrong = problem.exact(), 0
    for seed in range(8):
        with harness.interleaved(seed), broken(name, function):
            results = problem.ours(plan=plan(problem))
        wrong += any(not error(results[name], exact[name]) < 1e-5 for name in exact)
    assert wrong >= at_least


def sends_nothing(ptr, h, INTERPRET: tl.constexpr):
    pass


@pytest.mark.parametrize("name, function", [("send_h", sends_nothing), ("send_shares", not_flagged)])
def test_interleaving_catches_what_never_arrives(name, function):
    with harness.interleaved(0, patience=200), broken(name, function), pytest.raises(
            triton.runtime.errors.InterpreterError, match="wait for ever"):
        PROBLEM.ours(plan=plan(PROBLEM))


def tell_missing(words_ptr, found_ptr, dtype: tl.constexpr):
    at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    tl.store(found_ptr + at, is_missing(missing(tl.load(words_ptr + at), dtype), dtype).to(tl.int32))


def test_what_is_missing():
    """A word of two 16-bit values, or of one 32-bit value, is missing only if all bits of a value are set. Tests every
    16-bit value next to some others, in both places."""
    every, some = torch.arange(65536)[:, None], torch.tensor([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    pairs = torch.cat([every * 65536 + some, some * 65536 + every]).reshape(-1)
    words = torch.where(pairs < 2 ** 31, pairs, pairs - 2 ** 32).int()
    either = (pairs % 65536 == 65535) | (pairs // 65536 == 65535)
    with harness.interpreter():
        kernel = triton.jit(tell_missing)
        for dtype, right in ((tl.bfloat16, either), (tl.float32, pairs == 2 ** 32 - 1)):
            found = torch.empty(len(words), dtype=torch.int32)
            kernel[(len(words) // 4096,)](words, found, dtype)
            assert torch.equal(found.bool(), right), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nans_arrive(dtype):
    problem = NotFinite(4, 4, 2, 33, dtype=dtype)
    exact = problem.exact()
    assert exact["y"].isnan().any() and not exact["y"].isnan().all()
    for seed in range(2):
        with harness.interleaved(seed):
            problem.check(problem.ours(plan=plan(problem)))
        with harness.emulator(seed=seed):
            problem.check(problem.ours(plan=plan(problem)))


UNWATCHED = (None,) * 5


def there_and_back(shares_ptr, memory_ptr, total_ptr, flag):
    row, unit = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    send_shares(memory_ptr + row * 16 + 2 * tl.arange(0, 8)[None, :], tl.load(shares_ptr + row * 16 + unit), flag, True)
    tl.store(total_ptr + row * 16 + unit, add_shares(memory_ptr, flag, UNWATCHED, 1, 256, 16, 16, 2))


@pytest.mark.parametrize("flag", [0, 1])
def test_shares_lose_their_last_bit_only(flag):
    shares = torch.randn(16, 16)
    shares[0, :7] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0., -0., 2 ** -126, 1.])
    memory, total = torch.empty(256), torch.full((16, 16), torch.nan)
    memory.view(torch.int32).fill_(1 - flag)
    with harness.interpreter():
        triton.jit(there_and_back)[(1,)](shares, memory, total, flag)
    assert torch.equal(total.view(torch.int32)[1:], shares.view(torch.int32)[1:] & -2)
    assert total[0, 2].isnan() and torch.equal(total[0, [0, 1, 3, 4, 5, 6]], shares[0, [0, 1, 3, 4, 5, 6]])


def test_programs_one_by_one_are_refused():
    """Triton's interpreter runs programs one after the other, so it would hang."""
    with harness.interpreter(), pytest.raises(RuntimeError, match="3 programs"):
        PROBLEM.ours(plan=plan(PROBLEM))


WEAK = Problem(4, 17, 2, 33, D=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", range(6))
def test_compiled_in_weak_memory(seed, arch):
    with harness.emulator(arch, seed=seed, memory="weak"):
        WEAK.check(WEAK.ours(plan=plan(WEAK, 1 + seed % 2)))


@pytest.mark.parametrize("kernel", ["forward_grid", "backward_grid"])
def test_emulator_catches_what_never_arrives(kernel):
    def edit(ptx):
        stores = [n for n, line in enumerate(ptx.splitlines()) if "st.relaxed" in line]
        assert stores
        return "\n".join(line for n, line in enumerate(ptx.splitlines()) if n != stores[-1])

    with harness.emulator(edit=edit, only=[kernel], patience=200), pytest.raises(Deadlock):
        WEAK.ours(plan=plan(WEAK))


@pytest.mark.parametrize("kernel", ["forward_grid", "backward_grid"])
def test_emulator_catches_a_missing_wait(kernel):
    """Edits the PTX so that the branch that ends a wait is always taken."""
    def edit(ptx):
        loads = ptx.index("ld.volatile")
        head, tail = ptx[:loads], ptx[loads:]
        branch = re.search(r"@%p\d+ (?=bra)", tail)
        assert branch
        return head + tail[:branch.start()] + tail[branch.end():]

    exact, caught = WEAK.exact(), 0
    for seed in range(4):
        with harness.emulator(seed=seed, memory="weak", edit=edit, only=[kernel]):
            results = WEAK.ours(plan=plan(WEAK))
        caught += any(not error(results[name], exact[name]) < 0.03 for name in exact)
    assert caught >= 3
