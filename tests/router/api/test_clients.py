"""The official clients, unmodified, through the router's real processes."""

from __future__ import annotations

import asyncio

import anthropic
import httpx
import openai
import pytest

from ..stubs import KEY
from .conftest import Endpoint
from .engine import ApiEngine

WORDS = [{"role": "user", "content": "a b c d"}]


def client(endpoint: Endpoint) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0, timeout=20)


def claude(endpoint: Endpoint) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=endpoint.url, api_key=KEY, max_retries=0, timeout=20)


async def test_openai_client_chats_completes_embeds_and_lists(endpoint: Endpoint) -> None:
    await endpoint.start(ApiEngine("aggregated-0"), ApiEngine("aggregated-1"))
    async with client(endpoint) as ours:
        chat = await ours.chat.completions.create(model="toy", messages=WORDS, max_tokens=2)
        assert chat.choices[0].message.content == "a/- b/- "
        assert chat._request_id
        stream = await ours.chat.completions.create(
            model="toy", messages=WORDS, stream=True, stream_options={"include_usage": True}
        )
        parts = [part async for part in stream]
        assert "".join(part.choices[0].delta.content for part in parts if part.choices) == "a/- b/- c/- "
        assert parts[-1].usage.completion_tokens == 3
        text = await ours.completions.create(model="toy", prompt="a b c d", n=2, seed=1)
        assert [choice.text for choice in text.choices] == ["a/1 b/1 c/1 ", "a/2 b/2 c/2 "]
        embedding = await ours.embeddings.create(model="toy", input="hi", encoding_format="float")
        assert embedding.data[0].embedding == [0.5, 0.25]
        assert [model.id async for model in ours.models.list()] == ["toy"]
        assert (await ours.models.retrieve("toy")).id == "toy"


async def test_openai_client_hears_its_api_in_errors(endpoint: Endpoint) -> None:
    await endpoint.start(ApiEngine("aggregated-0"))
    async with client(endpoint) as ours:
        with pytest.raises(openai.NotFoundError, match="served: toy") as unknown:
            await ours.chat.completions.create(model="gpt-9", messages=WORDS)
        assert unknown.value.code == "model_not_found"
        assert unknown.value.request_id
        with pytest.raises(openai.NotFoundError):
            await ours.models.retrieve("gpt-9")
        with pytest.raises(openai.AuthenticationError):
            await ours.with_options(api_key="wrong").models.list()


async def test_openai_client_stores_reads_and_cancels_responses(endpoint: Endpoint) -> None:
    """By id, whichever of two workers wrote the response and whichever of two router processes placed it."""
    engines = ApiEngine("aggregated-0"), ApiEngine("aggregated-1")
    await endpoint.start(*engines, processes=2)
    written = []
    async with client(endpoint) as ours:
        for number in range(4):
            background = number % 2 == 1
            written.append(
                await ours.responses.create(model="toy", input="hi", background=background, store=True)
            )
        stream = await ours.responses.create(model="toy", input="hi", stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events][-1] == "response.completed"
        written.append(events[0].response)
    assert {entry.id.split("_")[1] for entry in written} == {engine.name for engine in engines}
    for entry in written:
        # A new connection may be another process's.
        async with client(endpoint) as ours:
            assert (await ours.responses.retrieve(entry.id)).id == entry.id
            after = await ours.responses.create(model="toy", input="more", previous_response_id=entry.id)
            assert after.id.split("_")[1] == entry.id.split("_")[1]
    async with client(endpoint) as ours:
        assert (await ours.responses.cancel(written[1].id)).status == "cancelled"
        with pytest.raises(openai.NotFoundError):
            await ours.responses.retrieve("resp_nobody")


async def test_openai_client_sends_sound(endpoint: Endpoint) -> None:
    engine, other = ApiEngine("aggregated-0", models=("whisper",)), ApiEngine("aggregated-1")
    await endpoint.start(engine, other)
    async with client(endpoint) as ours:
        await _until_served(ours, "whisper")
        sound = b"RIFF" + bytes(range(256)) * 4000
        heard = await ours.audio.transcriptions.create(model="whisper", file=("a.wav", sound))
        assert heard.text.startswith("aggregated-0 heard")
        (seen,) = engine.asked("/v1/audio/transcriptions")
        assert sound in seen.raw
        with pytest.raises(openai.NotFoundError, match="whisper"):
            await ours.audio.transcriptions.create(model="other", file=("a.wav", sound))


async def test_anthropic_client_talks_streams_and_counts(endpoint: Endpoint) -> None:
    engine = ApiEngine("aggregated-0")
    await endpoint.start(engine)
    async with claude(endpoint) as ours:
        asked = {"model": "toy", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
        message = await ours.messages.create(**asked)
        assert message.content[0].text == "hello from aggregated-0"
        assert message._request_id
        async with ours.messages.stream(**asked) as stream:
            assert [text async for text in stream.text_stream] == ["hello"]
        counted = await ours.messages.count_tokens(model="toy", messages=asked["messages"])
        assert counted.input_tokens > 0
    for seen in engine.asked("/v1/messages"):
        assert KEY.encode() not in b" ".join(value for _, value in seen.headers)
        assert seen.header(b"anthropic-version")


async def test_anthropic_client_hears_its_api_in_errors(endpoint: Endpoint) -> None:
    await endpoint.start(ApiEngine("aggregated-0"))
    async with claude(endpoint) as ours:
        asked = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await ours.messages.create(model="nope", **asked)
        assert unknown.value.body["error"]["type"] == "not_found_error"
        assert unknown.value.request_id == unknown.value.body["request_id"]
        with pytest.raises(anthropic.AuthenticationError):
            await ours.with_options(api_key="wrong").messages.create(model="toy", **asked)


async def test_usage_of_both_apis_is_counted(endpoint: Endpoint) -> None:
    await endpoint.start(ApiEngine("aggregated-0"))
    async with claude(endpoint) as ours, client(endpoint) as theirs:
        await ours.messages.create(model="toy", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
        await theirs.responses.create(model="toy", input="hi")
        async with ours.messages.stream(
            model="toy", max_tokens=9, messages=[{"role": "user", "content": "hi"}]
        ) as stream:
            await stream.get_final_message()
        async for _ in await theirs.responses.create(model="toy", input="hi", stream=True):
            pass
    async with httpx.AsyncClient() as plain:
        text = (await plain.get(f"{endpoint.url}/metrics", headers={"authorization": f"Bearer {KEY}"})).text
    lines = text.splitlines()
    assert "hpcserve_router_prompt_tokens_total 24" in lines
    assert "hpcserve_router_cached_tokens_total 12" in lines
    assert "hpcserve_router_generation_tokens_total 8" in lines
    assert 'hpcserve_router_key_tokens_total{key="run",kind="prompt"} 24' in lines


async def _until_served(ours: openai.AsyncOpenAI, model: str) -> None:
    """Engines are asked for their models when they join."""
    names: list[str] = []
    for _ in range(200):
        names = [entry.id async for entry in ours.models.list()]
        if model in names:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{model} is not among {names}")
