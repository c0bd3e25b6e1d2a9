"""OpenAI's Batch API for one run: a process of its own, which the router passes requests on to."""
