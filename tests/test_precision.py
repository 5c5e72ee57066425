"""Rounding to TF32 on the host; and torch's switch for TF32 products: its value inside and after ``products_in_tf32``,
also in other threads."""
import threading

import pytest
import torch
from triton_lstm.kernels.precision import products_in, products_in_tf32, rounded_to_tf32, same_nans

QUIET = {torch.float32: 0x7fc00000, torch.float16: 0x7e00, torch.bfloat16: 0x7fc0}


def floats(*bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_rounded_to_tf32():
    """Halfway away from zero, over the end of a binade and to infinity. The carry of a NaN makes no zero of it."""
    given = floats(0x3f801000, 0x3f800fff, 0xbf801000, 0x3ffff000, 0x7f7ff000, 0x7f800000, 0xff800000, 0x80000000,
                   0x1000, 0x7fffffff, 0xffffffff, 0x7f800001)
    right = floats(0x3f802000, 0x3f800000, 0xbf802000, 0x40000000, 0x7f800000, 0x7f800000, 0xff800000, 0x80000000,
                   0x2000, *[QUIET[torch.float32]] * 3)
    assert torch.equal(rounded_to_tf32(given).view(torch.int32), right.view(torch.int32))
    out = torch.zeros(3, 4, 5)
    rounded_to_tf32(given.reshape(4, 3).t(), out=out[:, :, 1][:, :4])
    assert torch.equal(out[:, :, 1].view(torch.int32), right.reshape(4, 3).t().view(torch.int32))
    assert out.count_nonzero() == 11            # -0 is none


@pytest.mark.parametrize("dtype", QUIET, ids=str)
def test_same_nans(dtype):
    ints = torch.int32 if dtype == torch.float32 else torch.int16
    v = torch.tensor([-1, -1, -1, -1], dtype=ints).view(dtype)
    v[1:] = torch.tensor([float("inf"), -float("inf"), 0.3])
    found = same_nans(v)
    assert found[0].view(ints).item() == QUIET[dtype] and torch.equal(found[1:], v[1:])


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def read():
    """The values of all of torch's switches for TF32 products; "mixed" for one that raises."""
    def ask(question):
        try:
            return question()
        except RuntimeError:
            return "mixed"
    matmul = torch.backends.cuda.matmul
    newer = (lambda: matmul.fp32_precision, lambda: torch.backends.mkldnn.matmul.fp32_precision) if NEWER else ()
    return [ask(question) for question in (lambda: matmul.allow_tf32, torch.get_float32_matmul_precision, *newer)]


def set_newer(value):
    torch.backends.cuda.matmul.fp32_precision = value


SETTINGS = dict(
    default=lambda: None, high=lambda: torch.set_float32_matmul_precision("high"),
    medium=lambda: torch.set_float32_matmul_precision("medium"),
    older=lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    newer_tf32=lambda: set_newer("tf32"), newer_ieee=lambda: set_newer("ieee"))


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        set_newer("none")
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_is_set_and_restored(setting, tf32):
    if setting.startswith("newer") and not NEWER:
        pytest.skip("needs torch 2.9")
    SETTINGS[setting]()
    before = read()
    with products_in_tf32(tf32):
        inside = read()
        assert (inside[2] == "tf32" if NEWER else inside[0]) == tf32
        # reading a switch does not raise, unless it raised before
        assert "mixed" not in inside or "mixed" in before
        with products_in_tf32(not tf32):
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32" if NEWER else
                    torch.backends.cuda.matmul.allow_tf32) != tf32
        assert read() == inside
    assert read() == before


def test_untouched_where_it_agrees(monkeypatch):
    monkeypatch.setattr("triton_lstm.kernels.precision._set", None)         # so that calling it fails
    with products_in_tf32(False):
        pass
    torch.set_float32_matmul_precision("high")
    with products_in("tf32"):
        pass
    with products_in("native"):
        pass
    with pytest.raises(TypeError), products_in("tf32x3"):
        pass


def test_restored_after_an_error():
    before = read()
    with pytest.raises(KeyError), products_in_tf32(True):
        raise KeyError
    assert read() == before


def test_threads_exclude_each_other():
    """Two threads want TF32 and two do not. Each finds the switch as it wants it while it is inside."""
    before, wrong, entered = read(), [], []

    def run(tf32):
        for _ in range(200):
            with products_in_tf32(tf32):
                entered.append(tf32)
                seen = {(read()[2] == "tf32") if NEWER else read()[0] for _ in range(3)}
            if seen != {tf32}:
                wrong.append(seen)

    threads = [threading.Thread(target=run, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and entered.count(True) == entered.count(False) == 400
    assert read() == before
