"""A small strict HTTP/1.1 server and a pooled client on asyncio and httptools."""
