"""A server that behaves like vLLM 0.32 where a router can see it, without a model or a GPU.

For tests, sizing and demonstrations: prefix cache, continuous batching, KV events, prefill/decode
handshake with real bytes over TCP, metrics and failures on command. Text is a pure function of the
tokens before it, so that answers can be compared between routes. `python -m hpcserve.engines.fake_server`.
"""
