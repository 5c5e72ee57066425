"""The benchmark of triton_lstm: ``python -m bench --help``."""
