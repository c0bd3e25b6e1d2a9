"""A stand-in for an engine: `child.py PORT GENERATION [MODE]`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, generation, mode = int(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or [""])[0]


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if mode == "hang-first" and generation == 1 and time.monotonic() - started > 0.5:
            time.sleep(60)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


started = time.monotonic()
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: sys.exit(0))
if mode == "crash":
    sys.exit("boom")
if mode == "fatal":
    sys.exit("fatal: bad flag")
if mode == "port-taken-once" and generation == 1:
    sys.exit("OSError: [Errno 98] Address already in use")
if mode == "slow":
    print("weights 0/2\rweights 1/2\r", end="", flush=True)
    time.sleep(60)
if mode == "mute":
    time.sleep(60)
if mode == "stubborn":
    print("child", subprocess.Popen(["sleep", "60"]).pid, flush=True)
ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
