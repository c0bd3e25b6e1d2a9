"""Stands in for TensorRT-LLM 1.2, which needs CUDA: its launcher, its server's command, and its MPI workers.

What it shares with the real one is how it starts, what the workers' MPI world is, and how it dies. Requests
are answered by hpcserve's fake engine in TensorRT-LLM's dialect.
"""
