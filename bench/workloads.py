"""LSTM layers that people really run, with the public source of each size."""
import dataclasses

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("train", "forward", "stream")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One use of an LSTM; sizes as nn.LSTM counts them, hidden_size of one direction.

    mode     "train": forward and backward; "forward": inference over whole sequences; "stream": one step a call
    source   the public file or paper the sizes come from; batch or steps may be derived from a config there
    needs    what it asks for beyond padded sequences
    """
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
    needs: str = ""


WORKLOADS = tuple(Workload(*row) for row in (
    ("pufferlib_breakout", 512, 64, 128, 128, 1, 1, "fp32", "train", "PufferLib config/ocean/breakout.ini"),
    ("isaac_ppo", 4096, 32, 32, 256, 1, 1, "fp32", "train", "pytorch/rl bench_rnn_recompute_memory.py", "resets"),
    ("legged_gym", 1024, 24, 235, 512, 1, 1, "fp32", "train", "legged_robot_config.py", "resets"),
    ("cleanrl_atari", 8, 128, 512, 128, 1, 1, "fp32", "train", "cleanrl ppo_atari_lstm.py", "resets"),
    # the source names no type: TensorFlow's default
    ("r2d2", 64, 140, 531, 512, 1, 1, "fp32", "train", "seed_rl learner.py"),
    ("openunmix", 16, 255, 512, 256, 3, 2, "fp32", "train", "open-unmix model.py", "dropout 0.4"),
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
    ("kokoro", 1, 512, 640, 256, 1, 2, "fp32", "forward", "kokoro modules.py", "packed"),
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
