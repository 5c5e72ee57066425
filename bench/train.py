"""Trains a character model with torch's LSTM and with ours, from the same weights and on the same batches."""
import dataclasses
import pathlib
import statistics
import sys
import sysconfig
import time

import torch
import triton

import triton_lstm

from . import plots
from .correctness import dtype_of

TEXT_BYTES = 1 << 22
LAYERS = {"torch.nn.LSTM": torch.nn.LSTM, "triton_lstm.LSTM": triton_lstm.LSTM}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sequences in a batch, characters in a sequence, hidden units of each layer, training steps."""
    batch: int
    sequence: int
    hidden: int
    steps: int


SIZES = {"cuda": Sizes(64, 128, 512, 300), "interpreter": Sizes(8, 16, 32, 40)}


def chosen(args, interpreted):
    """The ``Sizes`` of a command line, with the defaults for those that it does not name."""
    sizes = SIZES["interpreter" if interpreted else "cuda"]
    return Sizes(*(getattr(args, f.name) or getattr(sizes, f.name) for f in dataclasses.fields(Sizes)))


class Model(torch.nn.Module):
    """Predicts the next of 256 characters: from characters (T, B) to logits (T, B, 256)."""

    def __init__(self, layer_class, hidden, layers):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, hidden)
        self.lstm = layer_class(hidden, hidden, layers)
        self.head = torch.nn.Linear(hidden, 256)

    def forward(self, characters):
        return self.head(self.lstm(self.embedding(characters))[0])


def read_text():
    """Some megabytes of the sources of Python's standard library, as a tensor of bytes."""
    data = bytearray()
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data += path.read_bytes()
    return torch.frombuffer(data[:TEXT_BYTES], dtype=torch.uint8)


def batches(text, sizes, seed):
    """``sizes.steps`` batches (sequence + 1, batch) of sequences that begin at random places of the text."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(sizes.sequence + 1)[:, None]
    for _ in range(sizes.steps):
        yield text[offsets + torch.randint(len(text) - sizes.sequence, (sizes.batch,), generator=generator)].long()


class Trainer:
    """A model and Adam, which updates fp32 copies of the weights. In fp16 the loss is scaled by a constant."""

    def __init__(self, model):
        self.model, self.weights = model, list(model.parameters())
        self.scale = 4096. if self.weights[0].dtype == torch.float16 else 1.
        self.copies = [w.detach().float().requires_grad_() for w in self.weights]
        self.optimizer = torch.optim.Adam(self.copies, lr=2e-3)

    def step(self, characters):
        """One step of training; returns the loss before it."""
        logits = self.model(characters[:-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), characters[1:].flatten())
        self.model.zero_grad()
        (loss * self.scale).backward()
        for copy, weight in zip(self.copies, self.weights):
            copy.grad = weight.grad.float() / self.scale
        self.optimizer.step()
        with torch.no_grad():
            for copy, weight in zip(self.copies, self.weights):
                weight.copy_(copy)
        return loss.item()


def train(sizes, layers, seed, dtype, device):
    """({name: [loss]}, {name: [characters a second]}), an entry for each step. An interrupted run returns the complete
    steps."""
    torch.manual_seed(seed)
    models = {name: Model(layer_class, sizes.hidden, layers).to(device, dtype) for name, layer_class in LAYERS.items()}
    start = next(iter(models.values())).state_dict()
    for model in models.values():
        model.load_state_dict(start)
    trainers = {name: Trainer(model) for name, model in models.items()}
    losses, rates = ({name: [] for name in models} for _ in range(2))
    began = time.monotonic()
    try:
        for step, characters in enumerate(batches(read_text(), sizes, seed), 1):
            characters = characters.to(device)
            for name, trainer in trainers.items():
                _wait(device)
                before = time.perf_counter()
                loss = trainer.step(characters)
                _wait(device)
                rates[name].append(sizes.batch * sizes.sequence / (time.perf_counter() - before))
                losses[name].append(loss)
            if step % max(sizes.steps // 20, 1) == 0 or step == 1:
                left = (time.monotonic() - began) / step * (sizes.steps - step)
                both = lambda value: " / ".join(value(name) for name in models)
                print(f"[{step}/{sizes.steps}] loss {both(lambda name: f'{losses[name][-1]:.4f}')}, "
                      + (f"characters/s {both(lambda name: f'{rates[name][-1]:,.0f}')}, " if device == "cuda" else "")
                      + f"{left:.0f} s left", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        steps = len(losses[name := list(models)[-1]])           # the second layer's: the first may be a step ahead
        losses = {name: curve[:steps] for name, curve in losses.items()}
        print(f"interrupted after {steps} steps", file=sys.stderr)
    return losses, rates


def _wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def run(out, sizes, layers=1, seed=0, dtype="fp32", interpreted=False):
    """Train, print the results and draw them into train.png in the folder ``out``; returns the exit code.

    ``interpreted`` says that the kernels run in Triton's interpreter on the CPU. Speed means nothing there and is left
    out.
    """
    print(f"{' and '.join(LAYERS)}: batch {sizes.batch}, {sizes.sequence} characters, hidden {sizes.hidden}, "
          f"{layers} layer(s), {sizes.steps} steps, {dtype}", flush=True)
    if interpreted:
        print("The kernels run in Triton's interpreter on the CPU. Losses can be compared; speed would mean nothing "
              "and is left out.", flush=True)
    losses, rates = train(sizes, layers, seed, dtype_of(dtype), "cpu" if interpreted else "cuda")
    if not all(losses.values()):
        return 130
    difference = max(abs(a - b) for a, b in zip(*losses.values()))
    # the first step compiles
    speeds = None if interpreted else {name: statistics.median(r[1:] or r) for name, r in rates.items()}
    for name, curve in losses.items():
        print(f"{name}: final loss {curve[-1]:.6f}" + (f", {speeds[name]:,.0f} characters/s" if speeds else ""))
    print(f"largest difference between the loss curves: {difference:.1e}")
    out.mkdir(parents=True, exist_ok=True)
    where = "CPU, kernels in Triton's interpreter: no speed" if interpreted else torch.cuda.get_device_name()
    caption = (f"Character model on Python's standard library; batch {sizes.batch}, {sizes.sequence} characters, "
               f"{layers} layer(s) of {sizes.hidden} units, {dtype}, seed {seed}; largest difference of the losses "
               f"{difference:.1e}. {where}, torch {torch.__version__}, Triton {triton.__version__}, triton_lstm "
               f"{triton_lstm.__version__}.")
    plots.save(plots.training(losses, speeds, caption), out / "train.png")
    print(f"wrote {out / 'train.png'}")
    return 0
