"""``LSTMModule`` for TorchRL: ``torchrl.modules.LSTMModule`` whose resets are part of one call of the layer."""
try:
    import torchrl.modules
except ImportError as e:
    raise ImportError(f"triton_lstm.rl.torchrl needs TorchRL, and {e.name or 'a part of it'} cannot be imported: pip "
                      f"install torchrl") from e
import torch

from ..conversion import convert
from .episodes import run_episodes

__all__ = ["LSTMModule"]

if not hasattr(torchrl.modules.LSTMModule, "_lstm_triton_with_resets"):
    raise ImportError(f"triton_lstm.rl.torchrl needs a TorchRL whose LSTMModule has recurrent_backend='triton', such "
                      f"as 0.14; this is {torchrl.__version__}")


class LSTMModule(torchrl.modules.LSTMModule):
    """Takes the place of ``torchrl.modules.LSTMModule``: same arguments, keys, parameters, primer and results.

    In recurrent mode nothing is split or padded where ``is_init`` is set inside a row. ``lstm`` may be an nn.LSTM or a
    triton_lstm.LSTM with ``batch_first``.

    Two things differ. The state that an episode inside a row begins with must be zero, as it is with the primer of
    ``make_tensordict_primer``. The states returned in recurrent mode are those after the last step of each row, at that
    step, and zero at all others, also where another episode ends inside a row. TorchRL's documentation says not to use
    those. So the stored states inside a row get no gradients.

    Raises what TorchRL's class raises. Raises ValueError for a bidirectional layer, for ``python_based``, and for
    arguments that choose among TorchRL's backends; forward raises it where an episode inside a row begins with a state
    that is not zero. That check waits for the GPU, as TorchRL's own search for resets does.
    """

    def __init__(self, *args, **kwargs):
        for name in ("python_based", "recurrent_backend", "recurrent_compute_dtype", "recurrent_recompute",
                     "recurrent_matmul_precision"):
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r} is for TorchRL's own LSTMs")
        super().__init__(*args, **kwargs)
        if self.lstm.bidirectional:
            raise ValueError("a bidirectional LSTM does not run over a rollout: its reverse direction sees later steps")
        convert(self)
        self.recurrent_backend = "triton"           # the one that leaves resets to the method below

    def _lstm_triton_with_resets(self, input, hidden0_in, hidden1_in, is_init):
        """input (B, T, I); states (B, T, num_layers, H) before each step, of which the first ones count; is_init
        (B, T). Returns y (B, T, H), and h and c like the states given."""
        starts = is_init.clone()
        starts[:, 0] = False                        # the first state of a row counts also where an episode begins
        for name, states in zip(self.in_keys[1:], (hidden0_in, hidden1_in)):
            used = states[starts]                   # (episodes that begin inside rows, num_layers, H)
            if used.any():
                raise ValueError(f"an episode that begins inside a row must begin with a zero state, and {name!r} is "
                                 f"{used[used != 0][0].item():.3g} there: has the environment the transform of "
                                 f"make_tensordict_primer?")
        first = [s[:, 0].transpose(0, 1).contiguous() for s in (hidden0_in, hidden1_in)]
        y, last = run_episodes(self.lstm, input, first, starts)
        steps = input.shape[1]
        padded = (torch.nn.functional.pad(s.transpose(0, 1)[:, None], (0, 0, 0, 0, steps - 1, 0)) for s in last)
        return y, *padded
