"""KV events: what engines say about their prefix caches, read and digested."""
