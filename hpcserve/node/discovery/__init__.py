"""What a node has: addresses, GPUs, InfiniBand ports, versions."""
