"""Without Triton, as on macOS and Windows, the package can be imported, and torch's own LSTM computes."""
import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
import torch, triton_lstm
assert "triton" not in sys.modules
"""


def run(code):
    found = subprocess.run([sys.executable, "-c", BLOCK + textwrap.dedent(code)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_layers_compute():
    run("""
        for options in (dict(), dict(bidirectional=True, num_layers=2, proj_size=3), dict(zoneout=0.2)):
            torch.manual_seed(0)
            ours = triton_lstm.LSTM(4, 6, **options)
            theirs = torch.nn.LSTM(4, 6, **{name: of for name, of in options.items() if name != "zoneout"})
            theirs.load_state_dict(ours.state_dict())
            x, found = torch.randn(5, 3, 4), []
            for layer in (ours, theirs):
                y, (h, c) = layer(x)
                (y.sum() + h.sum() + c.sum()).backward()
                found.append([y, h, c, *(p.grad for p in layer.parameters())])
            same = all(torch.equal(a, b) for a, b in zip(*found))
            assert same == ("zoneout" not in options), options
        y, _ = triton_lstm.LSTM(4, 6)(x, lengths=torch.tensor([5, 2, 0]), reset=torch.rand(5, 3) < 0.5)
        assert y[2:, 1].eq(0).all() and y[:, 0].ne(0).all()
        h, c = triton_lstm.LSTMCell(4, 6)(x[0])
        assert h.shape == c.shape == (3, 6)
        model = torch.nn.Sequential(torch.nn.LSTM(4, 6))
        assert triton_lstm.convert(model).swapped == ["0"] and triton_lstm.to_torch(model).swapped == ["0"]
        torch.compile(ours, backend="eager")(x)
    """)


def test_it_says_so():
    out = run("""
        layer = triton_lstm.LSTM(4, 6)
        print(triton_lstm.explain(layer, torch.empty(5, 3, 4, device="meta")))
        sys.argv = ["triton_lstm"]
        import runpy
        runpy.run_module("triton_lstm", run_name="__main__")
    """)
    assert "torch's own LSTM computes: Triton is not installed" in out and ", no Triton, Python" in out


def test_a_cuda_device_is_not_asked_for_more():
    assert run("""
        from triton_lstm.plan.limits import none_on
        print(none_on("cuda"))
    """) == "Triton is not installed\n"


@pytest.mark.parametrize("missing", ["triton.backends", "numpy"])
def test_a_broken_triton_is_an_error(missing):
    """Only one that is not there is passed over."""
    code = BLOCK.replace('name.split(".")[0] == "triton"', f"name == {missing!r}").replace(
        'name=name.split(".")[0]', "name=name")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode and f"No module named '{missing}'" in found.stderr
