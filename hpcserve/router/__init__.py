"""The OpenAI endpoint of a run: takes requests, chooses replicas, carries bytes between them and clients."""
