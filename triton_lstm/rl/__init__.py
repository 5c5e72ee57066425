"""Reinforcement learning: LSTMs over rollouts in which episodes begin, without a loop over steps.

``run_episodes``            the function that replaces the loop of CleanRL and the LSTM call of PufferLib
``triton_lstm.rl.sb3``      policies for RecurrentPPO of sb3-contrib
``triton_lstm.rl.torchrl``  LSTMModule for TorchRL

Each library is imported only by its own module. README.md beside this file has examples.
"""
from .episodes import run_episodes

__all__ = ["run_episodes"]
