"""Weights on the nodes' own disks: read once from the shared file system and passed from node to node."""
