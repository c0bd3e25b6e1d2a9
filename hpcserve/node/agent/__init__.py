"""One agent per node: it supervises the engines of its node."""
