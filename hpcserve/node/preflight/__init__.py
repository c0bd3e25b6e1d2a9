"""KV preflight: prefill and decode nodes move a test buffer by NIXL, before any model is loaded."""
