"""DistributedDataParallel and FSDP2 with our layer: two processes give the gradients that one process gives."""
import os
import subprocess
import sys

import pytest
import torch

PROGRAM = '''
"""Run by torchrun: wraps the model, takes two optimizer steps on this rank's half of the batch, saves what it got."""
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_lstm
from triton_lstm.kernels import launch

wrapper, path = sys.argv[1:]
calls = []
real = launch.launch_kernel
launch.launch_kernel = lambda kernel, *a, **kw: (calls.append(kernel), real(kernel, *a, **kw))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = triton_lstm.LSTM(3, 6, num_layers=2, bidirectional=True)
        self.head = torch.nn.Linear(12, 2)

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return self.head(y).square().mean() + h.mean() + c.mean()


torch.manual_seed(0)
model = Model()
x = torch.randn(2, 3, 4, 3)         # steps, T, B, I
rank, results = 0, {}
if wrapper != "alone":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    x = x[:, :, 2 * rank:2 * rank + 2]
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model.lstm, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.lstm, triton_lstm.LSTM)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for step in range(2):
    model(x[step]).backward()
    for name, p in model.named_parameters():
        full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
        if wrapper == "fsdp":
            assert p.to_local().numel() < p.numel()
        results[name.removeprefix("module."), step] = full(p.grad).clone(), full(p).detach().clone()
    optimizer.step()
    optimizer.zero_grad()
assert len(calls) == 2 * (2 + 2 * 2), calls     # forward_resident; coefficients and backward_resident: all in kernels
if rank == 0:
    torch.save(results, path)
if wrapper != "alone":
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may outlive the interpreter's teardown, and C++ then ends the process with SIGABRT
    os._exit(0)
'''


def results(tmp_path, wrapper):
    program, path = tmp_path / "program.py", tmp_path / f"{wrapper}.pt"
    program.write_text(PROGRAM)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    starter = [] if wrapper == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *starter, str(program), wrapper, str(path)], capture_output=True, text=True,
                          env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return results(tmp_path_factory.mktemp("alone"), "alone")


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                    reason="this build of torch has no gloo")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_match_one(wrapper, alone, tmp_path):
    got = results(tmp_path, wrapper)
    assert got.keys() == alone.keys() and len(got) == 2 * (16 + 2)
    for name, pair in alone.items():
        for tensor, right in zip(got[name], pair):
            # Gradients are means of two halves, so sums are in another order, in fp32.
            torch.testing.assert_close(tensor, right, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    moved = [(alone[name, 1][1] - alone[name, 0][1]).abs().max() for name, step in alone if step == 0]
    assert min(moved) > 1e-3, "every parameter was trained, so that the second step's values mean something"
