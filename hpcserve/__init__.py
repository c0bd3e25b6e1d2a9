"""Serve and batch large language models on Slurm clusters."""

__version__ = "0.1.0"
