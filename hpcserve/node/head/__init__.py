"""The head node: controller, proof of the KV path, readiness, the end of the run."""
