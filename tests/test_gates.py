"""``gates``, compared with the equations step by step, and ``plot_gates``, which draws them."""
import contextlib
import sys
from unittest import mock

import pytest
import torch

import harness
import triton_lstm
from triton_lstm.inspection import Gates

both = pytest.mark.parametrize("computing", [harness.interpreter, contextlib.nullcontext], ids=["natively", "torch"])


def written_out(layer, x, hx):
    """[{"i", "f", "g", "o", "c", "h": (T, B, H)}] for each layer and direction, computed step by step in float64 from x
    (T, B, I)."""
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    directions, results, x = 1 + layer.bidirectional, [], x.double()
    for k in range(layer.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][:directions]:
            h, c = (s[len(results)].double() for s in hx)
            steps = []
            for t in (reversed(range(len(x))) if suffix else range(len(x))):
                a = x[t] @ weights[f"weight_ih_l{k}{suffix}"].t() + h @ weights[f"weight_hh_l{k}{suffix}"].t()
                if layer.bias:
                    a = a + weights[f"bias_ih_l{k}{suffix}"] + weights[f"bias_hh_l{k}{suffix}"]
                i, f, g, o = a.chunk(4, 1)
                i, f, g, o = 1 / (1 + (-i).exp()), 1 / (1 + (-f).exp()), g.tanh(), 1 / (1 + (-o).exp())
                c = f * c + i * g
                h = o * c.tanh()
                if layer.proj_size:
                    h = h @ weights[f"weight_hr_l{k}{suffix}"].t()
                steps.append((t, dict(i=i, f=f, g=g, o=o, c=c, h=h)))
            steps = [step for _, step in sorted(steps, key=lambda pair: pair[0])]
            results.append({name: torch.stack([step[name] for step in steps]) for name in steps[0]})
            outputs.append(results[-1]["h"])
        x = torch.cat(outputs, -1)
    return results


@pytest.mark.parametrize("kind, interpreted", [(torch.nn.LSTM, False), (triton_lstm.LSTM, False),
                                               (triton_lstm.LSTM, True)], ids=["torchs", "cpu", "interpreter"])
@pytest.mark.parametrize("options", [dict(), dict(bias=False, batch_first=True),
                                     dict(num_layers=2, bidirectional=True, dropout=0.5)], ids=str)
def test_equations(options, kind, interpreted):
    torch.manual_seed(0)
    layer = kind(4, 7, **options)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x, hx = torch.randn(5, 3, 4), (torch.randn(layers, 3, 7), torch.randn(layers, 3, 7))
    given = x.transpose(0, 1) if options.get("batch_first") else x
    want = written_out(layer, x, hx)
    for state in (hx, None):
        if state is None:
            want = written_out(layer, x, [torch.zeros(layers, 3, 7)] * 2)
        if interpreted:
            with harness.interpreter():
                got = triton_lstm.gates(layer, given, state)
        else:
            got = triton_lstm.gates(layer, given, state)
        assert isinstance(got, tuple) and len(got) == len(want) == layers
        for trajectories, right in zip(got, want):
            for name, value in trajectories._asdict().items():
                assert value.shape == (5, 3, 7) and value.dtype == torch.float32 and not value.requires_grad
                torch.testing.assert_close(value, right[name].float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("computing, dtype", [(contextlib.nullcontext, torch.float64),
                                              (harness.interpreter, torch.float32)], ids=["torch", "natively"])
def test_they_make_the_output(computing, dtype):
    """o tanh(c) of the last layer is y; also for unbatched input, and in float64, which torch computes."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(4, 7, num_layers=2, batch_first=True, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    hx = torch.randn(2, 2, 7, dtype=dtype).unbind()
    with computing():
        y, (_, c) = layer(x, hx)
        first, last = triton_lstm.gates(layer, x, hx)
    assert last.c.dtype == dtype and last.c.shape == (5, 1, 7)
    torch.testing.assert_close(last.o[:, 0] * last.c[:, 0].tanh(), y.detach())
    torch.testing.assert_close(torch.stack([first.c[-1, 0], last.c[-1, 0]]), c.detach())


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit(dtype, computing):
    """Gates are computed in fp32 from h in the layer's type. Autocast does not change that."""
    torch.manual_seed(0)
    layer, x = triton_lstm.LSTM(4, 7).to(dtype), torch.randn(5, 3, 4).to(dtype)
    with computing(), torch.autocast("cpu", torch.bfloat16):
        got, = triton_lstm.gates(layer, x)
    want, = written_out(layer, x, [torch.zeros(1, 3, 7)] * 2)
    for name, value in got._asdict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want[name].float(), rtol=0, atol=4 * torch.finfo(dtype).eps)


@both
def test_empty_sequence_and_batch(computing):
    layer = triton_lstm.LSTM(4, 7)
    with computing():
        assert triton_lstm.gates(layer, torch.zeros(0, 3, 4))[0].c.shape == (0, 3, 7)
        assert triton_lstm.gates(layer, torch.zeros(5, 0, 4))[0].i.shape == (5, 0, 7)


def test_errors():
    x = torch.zeros(5, 3, 4)
    with pytest.raises(TypeError, match="got GRU"):
        triton_lstm.gates(torch.nn.GRU(4, 7), x)
    with pytest.raises(TypeError, match="PackedSequence"):
        triton_lstm.gates(triton_lstm.LSTM(4, 7), torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2])))
    with pytest.raises(ValueError, match="weight_ih must have the shape"):
        triton_lstm.gates(triton_lstm.LSTM(4, 7), x[..., :3])
    with pytest.raises(ValueError, match="h0 must have the shape"):
        triton_lstm.gates(triton_lstm.LSTM(4, 7), x, (torch.zeros(1, 2, 7), torch.zeros(1, 3, 7)))


def ramps(c=3.):
    """Gates of 6 steps, 2 rows and 4 units, with different values in each panel."""
    steps = torch.linspace(0, 1, 6)[:, None, None].expand(6, 2, 4)
    return Gates(steps, steps / 2, steps * 2 - 1, 1 - steps, (steps - 0.5) * 2 * c)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra: pip install 'triton_lstm[bench]'")
    loaded = "matplotlib.pyplot" in sys.modules
    trajectories = ramps()
    figure = triton_lstm.plot_gates(trajectories, row=1, title="two words")
    assert ("matplotlib.pyplot" in sys.modules) == loaded and figure.get_suptitle() == "two words"
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["input gate i", "forget gate f", "candidate g", "output gate o",
                                                     "cell state c"]
    for axes, (name, value) in zip(panels, trajectories._asdict().items()):
        shown = torch.as_tensor(axes.images[0].get_array())
        torch.testing.assert_close(shown, value[:, 1].t())          # the image has units upwards and time to the right
        assert axes.images[0].get_clim() == {"g": (-1, 1), "c": (-3, 3)}.get(name, (0, 1))
    figure.savefig(tmp_path / "gates.png")
    harness.assert_drawn(tmp_path / "gates.png")
    with pytest.raises(IndexError):
        triton_lstm.plot_gates(trajectories, row=2)


def test_plot_without_matplotlib():
    with mock.patch.dict(sys.modules, {"matplotlib": None, "matplotlib.figure": None}), \
            pytest.raises(ImportError, match="pip install matplotlib"):
        triton_lstm.plot_gates(ramps())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float16, 5e-3)], ids=str)
def test_on_a_gpu(dtype, tolerance):
    """The layer computes in TF32 or fp16, so its h differ from those of the equations."""
    torch.manual_seed(0)
    layer = triton_lstm.LSTM(30, 200, num_layers=2, bidirectional=True).cuda().to(dtype)
    x = torch.randn(20, 17, 30, device="cuda", dtype=dtype)
    got, want = triton_lstm.gates(layer, x), written_out(layer, x, [torch.zeros(4, 17, 200, device="cuda")] * 2)
    for trajectories, right in zip(got, want):
        for name, value in trajectories._asdict().items():
            assert value.is_cuda
            torch.testing.assert_close(value, right[name].float(), rtol=0, atol=tolerance)
