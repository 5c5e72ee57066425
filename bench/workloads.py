"""LSTM layers of published models, with the source of their sizes, and the cases that a sweep times.

Needs no torch, so that a recorded run can be drawn on any machine.
"""
import dataclasses
import itertools
import random

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}     # names in torch
MODES = ("train", "forward", "stream")
SEQUENCES = ("padded", "ragged", "resets")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time. hidden_size is that of one direction, as in nn.LSTM.

    workload   name of a ``Workload``, or "grid" for a layer with as many inputs as hidden units
    mode       "train": forward and backward; "forward": inference over whole sequences; "stream": inference over one
               step in each call
    sequences  "padded": all rows have ``steps`` steps; "ragged": they have ``lengths``; "resets": they have ``steps``
               steps, and the state is zeroed before some of them
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
        """The length of each row. Those of ragged sequences are spread evenly over 1 to ``steps``, in a random order
        that is the same in each run."""
        if self.sequences != "ragged":
            return (self.steps,) * self.batch
        lengths = [self.steps - b * (self.steps - 1) // max(self.batch - 1, 1) for b in range(self.batch)]
        random.Random(0).shuffle(lengths)
        return tuple(lengths)

    @property
    def tokens(self):
        """Steps of all rows in a call, without padding."""
        return sum(self.lengths)

    @property
    def flop(self):
        """Floating-point operations of the matrix products of a call: W x and R h. Backward takes twice as many as
        forward."""
        widths = [self.input_size] + [self.directions * self.hidden_size] * (self.layers - 1)
        a_token = sum(2 * 4 * self.hidden_size * (width + self.hidden_size) for width in widths)
        return a_token * self.directions * self.tokens * (3 if self.mode == "train" else 1)

    @property
    def cudnn_algorithm(self):
        """The algorithm that torch asks cuDNN for at this shape on an A100, H100 or H200: of forward, followed by
        " / " and that of backward if it differs.

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
    """An LSTM layer of a published model. ``source`` is the file or paper that the sizes come from; batch or steps may
    be computed from a configuration there. The other fields are those of ``Case``."""
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
        """The ``Case`` of the layer as its source runs it, or in another type or mode. A stream has one step, so it has
        no lengths or resets."""
        mode = mode or self.mode
        steps, sequences = (1, "padded") if mode == "stream" else (self.steps, self.sequences)
        return Case(self.name, mode, dtype or self.dtype, self.batch, steps, self.input_size, self.hidden_size,
                    self.layers, self.directions, sequences, self.dropout)


WORKLOADS = tuple(Workload(*row) for row in (
    ("pufferlib_breakout", 512, 64, 128, 128, 1, 1, "fp32", "train", "PufferLib config/ocean/breakout.ini"),
    ("isaac_ppo", 4096, 32, 32, 256, 1, 1, "fp32", "train", "pytorch/rl bench_rnn_recompute_memory.py", "resets"),
    ("legged_gym", 1024, 24, 235, 512, 1, 1, "fp32", "train", "legged_robot_config.py", "resets"),
    ("cleanrl_atari", 8, 128, 512, 128, 1, 1, "fp32", "train", "cleanrl ppo_atari_lstm.py", "resets"),
    # its reset benchmark runs forward alone, with 65,536 rows; here it is a training step
    ("torchrl_resets", 128, 128, 32, 256, 1, 1, "fp32", "train",
     "pytorch/rl test_rnn_reset_backends_benchmark.py", "resets"),
    # the source names no type, so it is TensorFlow's default
    ("r2d2", 64, 140, 531, 512, 1, 1, "fp32", "train", "seed_rl learner.py"),
    ("openunmix", 16, 255, 512, 256, 3, 2, "fp32", "train", "open-unmix model.py", "padded", 0.4),
    ("pyannote_seg3", 32, 589, 60, 128, 4, 2, "fp32", "forward", "pyannote PyanNet.py"),
    ("dprnn_inter", 1000, 130, 128, 128, 1, 2, "fp32", "train", "asteroid DPRNN conf.yml"),
    ("tfgridnet_intra", 1503, 62, 192, 192, 1, 2, "fp32", "train", "espnet TFGridNet yaml"),
    # trained like this; decoding calls it for one step at a time
    ("rnnt_predictor", 64, 64, 640, 640, 1, 1, "bf16", "train", "NeMo fast-conformer transducer"),
    ("rnnt_mlperf_enc", 128, 557, 240, 1024, 2, 1, "fp16", "train", "mlcommons rnnt"),
    # one of five layers, whose directions alternate
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
    # the source names no type. R is 64 MiB in fp32, so the layer is timed in bf16, in which it would be trained today
    ("flair_lm", 100, 250, 100, 2048, 1, 1, "bf16", "train", "Flair"),
    # the paper measures fp16 and bf16; cuDNN is fastest in fp16
    ("flashrnn_768", 16, 1024, 768, 768, 1, 1, "fp16", "train", "FlashRNN paper grid"),
    ("fastrnns", 64, 100, 512, 512, 1, 1, "fp32", "train", "pytorch benchmarks/fastrnns"),
))

HIDDEN_SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048)
BATCHES = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
STEPS = (1, 16, 64, 128, 512, 1024)


def grid(modes, dtypes, batches, steps, hidden_sizes, sequences=("padded",)):
    """All combinations of these sizes, as cases of one layer with as many inputs as hidden units."""
    return [Case("grid", mode, dtype, B, T, H, H, sequences=s) for s, mode, dtype, B, T, H in
            itertools.product(sequences, modes, dtypes, batches, steps, hidden_sizes)]


def _named(dtypes):
    """Two lists: the workloads as their sources run them, and other cases of them, in the other ``dtypes`` and (two of
    them) in another mode."""
    named = [w.case() for w in WORKLOADS]
    other = [w.case(dtype) for w in WORKLOADS for dtype in dtypes if dtype != w.dtype]
    decode = [w.case(dtype, "stream") for w in WORKLOADS if w.name == "rnnt_predictor" for dtype in dtypes]
    forward = [w.case(dtype, "forward") for w in WORKLOADS if w.name == "flashrnn_768" for dtype in dtypes]
    return named, decode + forward + other


def quick():
    """A few cases that take less than two minutes."""
    names = ("pufferlib_breakout", "cleanrl_atari", "rnnt_predictor", "silero_vad", "flashrnn_768", "fastrnns")
    return ([w.case() for w in WORKLOADS if w.name in names]
            + grid(("forward", "train"), ("fp16", "bf16"), (16, 64), (128,), (128, 512))
            + grid(("train",), ("bf16",), (32,), (256,), (256,), ("ragged", "resets")))


def record():
    """What README shows, the most important cases first, because a run starts no case after 200 s."""
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
    """All cases of ``record``, then every combination of the grid."""
    return list(dict.fromkeys(
        record() + grid(("stream",), tuple(DTYPES), BATCHES, (1,), HIDDEN_SIZES)
        + grid(("train", "forward"), tuple(DTYPES), BATCHES, STEPS, HIDDEN_SIZES)
        + grid(("train", "forward"), tuple(DTYPES), (16, 64, 256), (128, 512), (128, 256, 512, 1024),
               ("ragged", "resets"))))
