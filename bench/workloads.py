"""LSTM layers that people really run, with the public source of each size, and the cases a sweep is made of.

Needs no torch: the plots of a recorded run are drawn on any machine.
"""
import dataclasses
import itertools
import random

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}     # names in torch
MODES = ("train", "forward", "stream")
SEQUENCES = ("padded", "ragged", "resets")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time; sizes as nn.LSTM counts them, hidden_size of one direction.

    workload   name of the ``Workload`` it is, or "grid" for a layer of as many inputs as units
    mode       "train": forward and backward; "forward": inference over whole sequences; "stream": one step a call
    sequences  "padded": all of ``steps``; "ragged": ``lengths``; "resets": the state is zeroed before some steps
    """
    workload: str
    mode: str
    dtype: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 1
    sequences: str = "padded"
    dropout: float = 0.

    @property
    def lengths(self):
        """Of each row: evenly spread over 1 to ``steps``, in an order that is the same each time."""
        if self.sequences != "ragged":
            return (self.steps,) * self.batch
        lengths = [self.steps - b * (self.steps - 1) // max(self.batch - 1, 1) for b in range(self.batch)]
        random.Random(0).shuffle(lengths)
        return tuple(lengths)

    @property
    def tokens(self):
        """Live steps of all rows in a call."""
        return sum(self.lengths)

    @property
    def flop(self):
        """Floating-point operations of a call's matrix products: W x and R h, in training twice as much again."""
        widths = [self.input_size] + [self.directions * self.hidden_size] * (self.layers - 1)
        a_token = sum(2 * 4 * self.hidden_size * (width + self.hidden_size) for width in widths)
        return a_token * self.directions * self.tokens * (3 if self.mode == "train" else 1)

    @property
    def cudnn_algorithm(self):
        """What torch asks of cuDNN for this shape, forward (/ backward where it differs), on an A100, H100 or H200.

        The rules are those of ``get_algo`` in torch's aten/src/ATen/native/cudnn/RNN.cpp.
        """
        ways = [self._algorithm(limit) for limit in ((192, 128) if self.mode == "train" else (192,))]
        return " / ".join(dict.fromkeys(ways))

    def _algorithm(self, small):
        if self.sequences == "ragged":
            return "STANDARD"
        if self.hidden_size <= small:
            return "PERSIST_STATIC_SMALL_H"
        if (self.dtype == "fp16" and self.layers == self.directions == 1 and self.hidden_size <= 1024
                and self.hidden_size % 128 == 0 and self.input_size % 128 == 0
                and self.batch % 8 == 0 and self.batch <= 128):
            return "PERSIST_STATIC"
        return "STANDARD"

    def __str__(self):
        return (f"{self.workload} {self.mode} {self.dtype} B={self.batch} T={self.steps} I={self.input_size} "
                f"H={self.hidden_size}" + f" {self.layers} layers" * (self.layers > 1)
                + " both directions" * (self.directions > 1) + f" {self.sequences}" * (self.sequences != "padded"))


@dataclasses.dataclass(frozen=True)
class Workload:
    """One use of an LSTM. ``source``: the public file or paper the sizes come from; batch or steps may be derived from
    a config there. The other fields are those of ``Case``."""
    name: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    dtype: str
    mode: str
    source: str
    sequences: str = "padded"
    dropout: float = 0.

    def case(self, dtype=None, mode=None):
        """As the source runs it, or in another type or mode. A stream has one step, and so no lengths or resets."""
        mode = mode or self.mode
        steps, sequences = (1, "padded") if mode == "stream" else (self.steps, self.sequences)
        return Case(self.name, mode, dtype or self.dtype, self.batch, steps, self.input_size, self.hidden_size,
                    self.layers, self.directions, sequences, self.dropout)


WORKLOADS = tuple(Workload(*row) for row in (
    ("pufferlib_breakout", 512, 64, 128, 128, 1, 1, "fp32", "train", "PufferLib config/ocean/breakout.ini"),
    ("isaac_ppo", 4096, 32, 32, 256, 1, 1, "fp32", "train", "pytorch/rl bench_rnn_recompute_memory.py", "resets"),
    ("legged_gym", 1024, 24, 235, 512, 1, 1, "fp32", "train", "legged_robot_config.py", "resets"),
    ("cleanrl_atari", 8, 128, 512, 128, 1, 1, "fp32", "train", "cleanrl ppo_atari_lstm.py", "resets"),
    # the source names no type: TensorFlow's default
    ("r2d2", 64, 140, 531, 512, 1, 1, "fp32", "train", "seed_rl learner.py"),
    ("openunmix", 16, 255, 512, 256, 3, 2, "fp32", "train", "open-unmix model.py", "padded", 0.4),
    ("pyannote_seg3", 32, 589, 60, 128, 4, 2, "fp32", "forward", "pyannote PyanNet.py"),
    ("dprnn_inter", 1000, 130, 128, 128, 1, 2, "fp32", "train", "asteroid DPRNN conf.yml"),
    ("tfgridnet_intra", 1503, 62, 192, 192, 1, 2, "fp32", "train", "espnet TFGridNet yaml"),
    # trained as here, then decoded one step a call
    ("rnnt_predictor", 64, 64, 640, 640, 1, 1, "bf16", "train", "NeMo fast-conformer transducer"),
    ("rnnt_mlperf_enc", 128, 557, 240, 1024, 2, 1, "fp16", "train", "mlcommons rnnt"),
    # one of five layers, which alternate in direction
    ("bonito_sup", 96, 1667, 1024, 1024, 1, 1, "fp16", "forward", "bonito dna_r10.4.1@v4.3"),
    ("crnn_ocr", 192, 26, 512, 256, 2, 2, "fp32", "train", "clovaai train.py"),
    ("camels_hydrology", 256, 365, 31, 128, 1, 1, "fp32", "train", "neuralhydrology"),
    ("deepar", 32, 192, 48, 40, 2, 1, "fp32", "train", "gluonts deepar"),
    ("tft_electricity", 64, 192, 160, 160, 1, 1, "fp32", "train", "google-research TFT"),
    ("encodec24k", 64, 75, 512, 512, 2, 1, "fp32", "train", "encodec lstm.py"),
    # a packed batch of one
    ("kokoro", 1, 512, 640, 256, 1, 2, "fp32", "forward", "kokoro modules.py", "ragged"),
    ("silero_vad", 1, 1, 128, 128, 1, 1, "fp32", "stream", "silero-vad tuning/utils.py"),
    ("nam_audio", 16, 8192, 1, 18, 3, 1, "fp32", "train", "NAM lstm.json"),
    # the middle one of three layers of different sizes
    ("awd_lstm", 80, 70, 400, 1150, 1, 1, "fp32", "train", "awd-lstm-lm"),
    # the source names no type; in fp32 this R would be 64 MiB, so take what one would train it in today
    ("flair_lm", 100, 250, 100, 2048, 1, 1, "bf16", "train", "Flair"),
    # measured there in fp16 and bf16: fp16 is where cuDNN is at its best
    ("flashrnn_768", 16, 1024, 768, 768, 1, 1, "fp16", "train", "FlashRNN paper grid"),
    ("fastrnns", 64, 100, 512, 512, 1, 1, "fp32", "train", "pytorch benchmarks/fastrnns"),
))

HIDDEN_SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048)
BATCHES = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
STEPS = (1, 16, 64, 128, 512, 1024)


def grid(modes, dtypes, batches, steps, hidden_sizes, sequences=("padded",)):
    """Cases of one layer with as many inputs as units: all combinations."""
    return [Case("grid", mode, dtype, B, T, H, H, sequences=s) for s, mode, dtype, B, T, H in
            itertools.product(sequences, modes, dtypes, batches, steps, hidden_sizes)]


def _named(dtypes):
    """Each workload as its source runs it, then the same in the other ``dtypes``."""
    named = [w.case() for w in WORKLOADS]
    other = [w.case(dtype) for w in WORKLOADS for dtype in dtypes if dtype != w.dtype]
    decode = [w.case(dtype, "stream") for w in WORKLOADS if w.name == "rnnt_predictor" for dtype in dtypes]
    forward = [w.case(dtype, "forward") for w in WORKLOADS if w.name == "flashrnn_768" for dtype in dtypes]
    return named, decode + forward + other


def quick():
    """A handful in under two minutes."""
    names = ("pufferlib_breakout", "cleanrl_atari", "rnnt_predictor", "silero_vad", "flashrnn_768", "fastrnns")
    return ([w.case() for w in WORKLOADS if w.name in names]
            + grid(("forward", "train"), ("fp16", "bf16"), (16, 64), (128,), (128, 512))
            + grid(("train",), ("bf16",), (32,), (256,), (256,), ("ragged", "resets")))


def record():
    """What README shows, the most important first: a run ends after 200 s, and what was left out is said."""
    named, more = _named(tuple(DTYPES))
    return list(dict.fromkeys(
        named
        + grid(("train", "forward"), ("bf16", "fp16"), (1, 16, 64, 256, 1024), (128,), (64, 128, 256, 512, 1024))
        + grid(("train", "forward"), ("fp16",), (64,), (512,), (256, 512), ("ragged", "resets"))
        + more
        + grid(("train", "forward"), ("bf16", "fp16"), (64,), STEPS, (256,))
        + grid(("train", "forward"), ("fp32",), (16, 64), (128,), (64, 128, 256, 512, 1024))
        + grid(("stream",), ("bf16", "fp32"), (1, 64), (1,), (128, 512, 1024))))


def full():
    """Everything of ``record``, then every combination of the grid."""
    return list(dict.fromkeys(
        record() + grid(("stream",), tuple(DTYPES), BATCHES, (1,), HIDDEN_SIZES)
        + grid(("train", "forward"), tuple(DTYPES), BATCHES, STEPS, HIDDEN_SIZES)
        + grid(("train", "forward"), tuple(DTYPES), (16, 64, 256), (128, 512), (128, 256, 512, 1024),
               ("ragged", "resets"))))
