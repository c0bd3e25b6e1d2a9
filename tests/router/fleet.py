"""A router process before fake engines of one dialect, 2 prefill and 2 decode: what their tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai

from tests.fake_engine.running import FakeEngine

from .test_process import KEY, Running

JOB_KEY = "job-key"
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
PROMPT = "the quick brown fox jumps over the lazy dog and thinks about it for quite a while longer"


class Fleet:
    """A router process, four engines, and one engine that does it all for comparison."""

    dialect = ""
    """Of the engines, and the router's name for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        key = folder / "job.key"
        key.write_text(JOB_KEY)
        self.engines: dict[str, FakeEngine] = {}
        self.ports: dict[str, int] = {}
        """Of prefill engines where decode engines meet them, by name."""
        self.generations = dict.fromkeys(NAMES, 0)
        for name in NAMES:
            self.launch(name)
        self.alone = FakeEngine(folder / "alone", "--dialect", self.dialect, key=KEY)
        self.router = Running(folder, job_key_file=str(key), engine=self.dialect, retries=2)
        self.url = f"http://127.0.0.1:{self.router.hear('listening')['port']}"
        self.announce(*NAMES)

    def flags(self, name: str) -> list[str]:
        """What else this engine is started with."""
        raise NotImplementedError

    def free(self, *names: str) -> None:
        """Returns when nothing runs on these engines."""
        raise NotImplementedError

    def launch(self, name: str) -> None:
        self.generations[name] += 1
        log = self._folder / f"{name}.{self.generations[name]}"
        role = name.partition("-")[0]
        flags = ("--dialect", self.dialect, "--role", role, *self.flags(name))
        self.engines[name] = FakeEngine(log, *flags, key=JOB_KEY)

    def announce(self, *names: str) -> None:
        workers = [
            {
                "name": name,
                "role": name.partition("-")[0],
                "url": self.engines[name].url,
                "ports": {"bootstrap": self.ports[name]} if name in self.ports else {},
                "generation": self.generations[name],
            }
            for name in names
        ]
        self.router.tell({"type": "workers", "state": "ready", "workers": workers})
        self.router.hear("stats", workers={name: {"in_flight": 0} for name in names})

    def client(self, base: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=30)

    def stop(self) -> None:
        self.router.stop()
        for engine in (*self.engines.values(), self.alone):
            engine.stop()


def streamed(client: openai.OpenAI, prompt: str, **fields: Any) -> str:
    asked = {"model": "toy", "prompt": prompt, "max_tokens": 40, "temperature": 0, **fields}
    chunks = client.completions.create(stream=True, **asked)
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def check_killed_decode(fleet: Fleet, client: openai.OpenAI) -> None:
    """A stream whose decode engine is killed ends with an error that names it, and others go on."""
    asked: dict[str, Any] = {"model": "toy", "max_tokens": 2000, "temperature": 0, "stream": True}
    streams = [client.completions.create(prompt=f"{i} {PROMPT}", **asked) for i in range(2)]
    for stream in streams:
        next(iter(stream))
    fleet.engines["decode-0"].stop()
    broken = 0
    for stream in streams:
        try:
            for _ in stream:
                pass
        except openai.APIError as error:
            broken += 1
            assert "decode-0" in str(error)
    assert broken == 1
    for i in range(4):
        assert streamed(client, f"{i} {PROMPT}")
    fleet.free("prefill-0", "prefill-1", "decode-1")
