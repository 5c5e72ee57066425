"""Policies for ``sb3_contrib.RecurrentPPO`` that run a rollout in one call of the layer, instead of in a loop.

``RecurrentPPO(MlpLstmPolicy, env)`` is all that changes. Parameters, initialisation, saved models and results are those
of sb3-contrib's policies of the same names.
"""
try:
    from sb3_contrib.common.recurrent import policies as theirs
except ImportError as e:
    raise ImportError(f"triton_lstm.rl.sb3 needs sb3-contrib, and {e.name or 'a part of it'} cannot be imported: pip "
                      f"install sb3-contrib") from e

from ..conversion import convert
from .episodes import run_episodes

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy"]


class _OneCall(theirs.RecurrentActorCriticPolicy):
    """Replaces the loop over steps. Raises ValueError for ``lstm_kwargs`` with which RecurrentPPO cannot work."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("batch_first", "bidirectional", "proj_size"):
            if self.lstm_kwargs.get(name):
                raise ValueError(f"RecurrentPPO cannot have an LSTM with {name}={self.lstm_kwargs[name]}")
        convert(self)                               # in place, so the optimizer holds the same Parameters

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        """features (B T, I) and episode_starts (B T,), rows first; lstm_states (num_layers, B, H) each. Returns
        (B T, H), rows first, and the new states."""
        rows = lstm_states[0].shape[1]
        x = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
        y, states = run_episodes(lstm, x, lstm_states, episode_starts.reshape(rows, -1).t())
        return y.transpose(0, 1).flatten(0, 1), states


class MlpLstmPolicy(_OneCall):
    """``sb3_contrib.ppo_recurrent.MlpLstmPolicy``, without its loop."""


class CnnLstmPolicy(_OneCall, theirs.RecurrentActorCriticCnnPolicy):
    """``sb3_contrib.ppo_recurrent.CnnLstmPolicy``, without its loop."""


class MultiInputLstmPolicy(_OneCall, theirs.RecurrentMultiInputActorCriticPolicy):
    """``sb3_contrib.ppo_recurrent.MultiInputLstmPolicy``, without its loop."""
