"""How programs that share R wait for each other, under hundreds of interleavings, and that a broken wait is caught."""
import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

import harness
from problems import Problem, error
from ptx_emulator import Deadlock, EmulatorError

PROBLEM = Problem(3, 3, 2, 33)          # three programs that exchange h, two chunks of steps


@pytest.fixture(scope="module")
def exact():
    return PROBLEM.exact()


def plan(problem, tiles=1):
    plan = problem.shared_plan("grid")
    return dataclasses.replace(plan, groups=-(-problem.B // (16 * tiles)), tiles=tiles)


@pytest.mark.parametrize("seed", range(80))
def test_interleaved(seed):
    with harness.interleaved(seed):
        PROBLEM.check(PROBLEM.ours(plan=plan(PROBLEM)))


@pytest.mark.parametrize("seed", range(20))
def test_interleaved_groups_of_two_tiles(seed):
    problem = Problem(3, 33, 2, 20)
    with harness.interleaved(seed):
        problem.check(problem.ours(plan=plan(problem, tiles=2)))


@contextlib.contextmanager
def barrier(function):
    """The kernels with ``function`` in the place of their barrier."""
    with harness.interpreting():
        broken = triton.jit(function)
    package = harness.interpreted_launch.__package__
    with mock.patch(f"{package}.forward.group_barrier", broken), \
            mock.patch(f"{package}.backward.group_barrier", broken):
        yield


def no_wait(count_ptr, target, INTERPRET: tl.constexpr):
    tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")


def waits_for_too_few(count_ptr, target, INTERPRET: tl.constexpr):
    tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu") - target < -1:
        pass


def no_arrival(count_ptr, target, INTERPRET: tl.constexpr):
    while tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu") - target < 0:
        pass


@pytest.mark.parametrize("broken, at_least", [(no_wait, 10), (waits_for_too_few, 2)])
def test_interleaving_catches_a_missing_wait(broken, at_least, exact):
    """No wait at all is wrong in every order; one arrival too few only where the last program is overtaken."""
    wrong = 0
    for seed in range(10):
        with harness.interleaved(seed), barrier(broken):
            results = PROBLEM.ours(plan=plan(PROBLEM))
        wrong += any(not error(results[name], exact[name]) < 1e-5 for name in exact)
    assert wrong >= at_least


def test_interleaving_catches_a_missing_arrival():
    with harness.interleaved(0), barrier(no_arrival), pytest.raises(
            triton.runtime.errors.InterpreterError, match="wait for ever"):
        PROBLEM.ours(plan=plan(PROBLEM))


def test_programs_one_by_one_are_refused():
    """The plain interpreter would hang."""
    with harness.interpreter(), pytest.raises(RuntimeError, match="3 programs"):
        PROBLEM.ours(plan=plan(PROBLEM))


WEAK = Problem(4, 17, 2, 33, D=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", range(10))
def test_compiled_in_weak_memory(seed, arch):
    with harness.emulator(arch, seed=seed, memory="weak"):
        WEAK.check(WEAK.ours(plan=plan(WEAK, 1 + seed % 2)))


@pytest.mark.parametrize("kernel", ["forward_grid", "backward_grid"])
@pytest.mark.parametrize("order", [".release", ".acquire"])
def test_weak_memory_catches_a_deleted(order, kernel):
    """The release or the acquire of one kernel made relaxed: some of a few seeds give a wrong number."""
    def edit(ptx):
        assert ptx.count(order) == 1
        return ptx.replace(order, ".relaxed")

    exact, caught = WEAK.exact(), 0
    for seed in range(4):
        with harness.emulator(seed=seed, memory="weak", edit=edit, only=[kernel]):
            results = WEAK.ours(plan=plan(WEAK))
        caught += any(not error(results[name], exact[name]) < 0.03 for name in exact)
    assert caught >= 2


def test_emulator_catches_a_missing_arrival():
    def edit(ptx):
        lines = [line for line in ptx.splitlines() if ".release" not in line]
        assert len(lines) == len(ptx.splitlines()) - 1
        return "\n".join(lines)

    with harness.emulator(edit=edit, only=["forward_grid"]), pytest.raises(Deadlock):
        WEAK.ours(plan=plan(WEAK))


def test_emulator_catches_a_missing_cta_barrier():
    """Without the barriers before the arrival, ours and the compiler's, it announces what no warp has stored yet."""
    def edit(ptx):
        head, tail = ptx.split("bar.sync 0; mov.b32", 1)
        between, tail = tail.split(".release", 1)
        return head + "mov.b32" + between.replace("bar.sync", "// ") + ".release" + tail

    exact, caught = WEAK.exact(), 0
    for seed in range(6):
        try:
            with harness.emulator(seed=seed, memory="weak", edit=edit, only=["forward_grid"]):
                results = WEAK.ours(plan=plan(WEAK))
            caught += not error(results["y"], exact["y"]) < 0.03
        except EmulatorError:
            caught += 1
    assert caught >= 1
