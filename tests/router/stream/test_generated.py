"""The account of a stream, and what of it the client sees, however its bytes are cut."""

from __future__ import annotations

import msgspec
import pytest

from hpcserve.router.stream.asked import Asked, ask, splice
from hpcserve.router.stream.asked import value as value_of
from hpcserve.router.stream.generated import EngineFault, GeneratedStream

HEAD = b'"id":"chatcmpl-1","object":"chat.completion.chunk","created":17,"model":"toy",'
ROLE = (
    b"data: {" + HEAD + b'"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    b'"finish_reason":null}],"prompt_token_ids":[5,6,7],"prompt_text":null}\n\n'
)
USAGE = (
    b"data: {"
    + HEAD
    + b'"choices":[],"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ODD = r'"},\"logprobs\":null,\"token_ids\":[9]} “日本” \n\ud83c\udf0a'


def chunk(text: str, ids: bytes | None, finish: str | None = None) -> bytes:
    reason = b"null" if finish is None else b'"%b"' % finish.encode()
    stop = b"" if finish is None else b'"stop_reason":null,'
    named = b"null" if ids is None else b"[" + ids + b"]"
    return (
        b"data: {" + HEAD + b'"choices":[{"index":0,"delta":{"content":' + msgspec.json.encode(text)
        + b'},"logprobs":null,"finish_reason":' + reason + b"," + stop + b'"token_ids":' + named + b"}]}\n\n"
    )  # fmt: skip


STREAM = [ROLE, chunk("a", b"1"), chunk(ODD, b"2,3"), chunk("", b"4"), chunk("z", b"5", "stop"), USAGE, DONE]


def run(pieces: list[bytes], **asked: bool) -> tuple[GeneratedStream, bytes]:
    out: list[bytes] = []
    wishes = Asked(**({"wants_ids": False, "wants_usage": False} | asked))  # type: ignore[arg-type]
    stream = GeneratedStream(out.append, wishes, chat=True, on_prompt_ids=lambda raw: True)
    for piece in pieces:
        stream.feed(piece)
    return stream, b"".join(out)


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 100_000])
def test_account_and_output_do_not_depend_on_where_the_bytes_are_cut(size: int) -> None:
    whole = b"".join(STREAM)
    stream, seen = run([whole[i : i + size] for i in range(0, len(whole), size)])
    expected, pieces = run(STREAM)
    assert seen == pieces
    for account in (stream, expected):
        assert account.sent() == "a" + ODD + "z"
        assert bytes(account.ids) == b"1,2,3,4,5," and account.tokens == 5
        assert account.prompt_ids == b"5,6,7"
        assert account.finished and account.done and account.plain
        assert account.usage == {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3}
    # What the client sees is what the engine writes for who asks for neither ids nor usage.
    assert seen == b"".join(
        [
            ROLE.replace(b"[5,6,7]", b"null"),
            chunk("a", None), chunk(ODD, None), chunk("", None), chunk("z", None, "stop"), DONE,
        ]
    )  # fmt: skip


def test_what_the_client_asked_for_stays() -> None:
    _, seen = run(STREAM, wants_ids=True, wants_usage=True)
    assert seen == b"".join(STREAM)


def test_place_where_the_text_reached_the_client_is_that_of_the_last_text() -> None:
    stream, _ = run(STREAM[:4])
    assert bytes(stream.ids[: stream.reached]) == b"1,2,3,"
    assert not stream.single
    stream, _ = run([*STREAM[:2], chunk("", b"4")])
    assert bytes(stream.ids[: stream.reached]) == b"1,"
    assert stream.single


def test_events_before_a_fault_are_passed_on_and_the_fault_is_not() -> None:
    out: list[bytes] = []
    stream = GeneratedStream(out.append, Asked(wants_ids=False, wants_usage=False), chat=True)
    fault = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
    with pytest.raises(EngineFault) as raised:
        stream.feed(ROLE + chunk("a", b"1") + fault)
    assert raised.value.event == fault and raised.value.status == 500
    assert b"".join(out).endswith(chunk("a", None))
    with pytest.raises(EngineFault):
        stream.feed(chunk("", b"2", "abort"))
    refusal = b'data: {"error": {"message": "no", "code": 400}}\n\n'
    stream.feed(refusal)
    assert stream.has_error and out[-1] == refusal


def test_sglangs_chat_is_usual_from_its_second_token_on() -> None:
    """As msgspec writes it there: `reasoning_content` is never left out."""
    out: list[bytes] = []
    stream = GeneratedStream(out.append, Asked(wants_ids=False, wants_usage=True), chat=True)
    given, steady = [], []
    for delta in (
        '{"reasoning_content":null,"role":"assistant","content":""}',
        '{"reasoning_content":null,"content":"a"}',
        '{"reasoning_content":null,"content":"b"}',
        '{"reasoning_content":"b","content":"c"}',
        '{"reasoning_content":null,"content":"d"}',
    ):
        end = ',"logprobs":null,"finish_reason":null,"matched_stop":null}]}\n\n'
        given.append(b"data: {" + HEAD + f'"choices":[{{"index":0,"delta":{delta}{end}'.encode())
        stream.feed(given[-1])
        steady.append(stream.steady)
        assert stream.plain == (len(given) < 4)
    assert steady == [False, False, True, False, True]
    assert out == given and (stream.sent(), stream.events) == ("abcd", 4)


def test_answer_that_is_more_than_text_is_known() -> None:
    call = b'"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}'
    event = chunk("", b"2").replace(b'"delta":{"content":""}', call)
    stream, _ = run([ROLE, event])
    assert not stream.plain


@pytest.mark.parametrize(
    ("body", "wants_ids", "wants_usage"),
    [
        (b'{"prompt":"x"}', False, False),
        (b" {}", False, False),
        (b'{"return_token_ids":true,"prompt":"x"}', True, False),
        (b'{"stream_options":{"include_usage":true}}', False, True),
        (b'{"stream_options":{"include_usage":false,"continuous_usage_stats":true}}', False, False),
        (b'{"stream_options":null,"x":1}', False, False),
    ],
)
def test_request_gets_what_the_account_needs(body: bytes, wants_ids: bool, wants_usage: bool) -> None:
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    asked = ask(given)
    assert (asked.wants_ids, asked.wants_usage) == (wants_ids, wants_usage)
    sent = msgspec.json.decode(splice(body, given, asked.added))
    assert sent["return_token_ids"] is True and sent["stream_options"]["include_usage"] is True
    assert bool(sent["stream_options"].get("continuous_usage_stats")) is False
    for name in given:
        if name not in asked.added:
            assert sent[name] == value_of(given, name)


def test_ids_are_not_asked_for_where_that_changes_the_answer() -> None:
    for given in ({"echo": True}, {"tools": []}, {"return_token_ids": False}):
        assert "return_token_ids" not in ask(given).added
