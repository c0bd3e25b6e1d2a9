"""The official client reads the fake engine's answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import NotFoundError, OpenAI

from .running import DEADLINE, FakeEngine


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[OpenAI]:
    with OpenAI(base_url=engine.url + "/v1", api_key="unused", timeout=DEADLINE, max_retries=0) as client:
        yield client


def test_streams_a_chat_from_several_threads(client: OpenAI, engine: FakeEngine) -> None:
    def stream(name: str) -> tuple[str, int]:
        chunks = client.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": name}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, count = "", 0
        for chunk in chunks:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            if chunk.usage is not None:
                count = chunk.usage.completion_tokens
        return text, count

    def whole(name: str) -> str | None:
        answer = client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": name}], max_tokens=12
        )
        return answer.choices[0].message.content

    names = ["Ada", "Grace", "Edsger", "Barbara"]
    with ThreadPoolExecutor(len(names)) as threads:
        streamed = list(threads.map(stream, names))
    assert streamed == [(whole(name), 12) for name in names]


def test_lists_models_and_embeds(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    vector = client.embeddings.create(model="toy", input="text").data[0].embedding
    assert sum(x * x for x in vector) == pytest.approx(1.0, rel=1e-5)


def test_reports_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
