"""OpenAI's batch lines: each answer in exactly one of the two files, each line one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcserve.batch.outputs.answers import Answer, failure
from hpcserve.batch.outputs.openai import OpenAIWriter
from hpcserve.errors import StorageError

from .made import answered, chat, failed, lines


def written(directory: Path, *answers: Answer, samples: int = 1) -> tuple[list[dict], list[dict]]:  # type: ignore[type-arg]
    output, errors = directory / "output.part", directory / "errors.part"
    with OpenAIWriter(output, errors, samples=samples) as writer:
        for answer in answers:
            writer.write(answer)
    return lines(output), lines(errors)


def test_an_answer_is_a_line_of_output_with_the_engines_body(tmp_path: Path) -> None:
    output, errors = written(tmp_path, answered(17, custom_id="question-1"))
    assert errors == []
    assert output == [
        {
            "id": "batch_req_17",
            "custom_id": "question-1",
            "response": {"status_code": 200, "request_id": "req-17", "body": chat()},
            "error": None,
        }
    ]


def test_a_refused_request_is_an_error_with_the_engines_answer(tmp_path: Path) -> None:
    told = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}
    output, errors = written(tmp_path, answered(3, told, status=400, custom_id="a"))
    assert output == []
    assert errors[0]["response"] == {"status_code": 400, "request_id": "req-3", "body": told}
    assert errors[0]["error"] == {"code": "http_400", "message": "too long"}


def test_what_was_never_answered_has_no_response(tmp_path: Path) -> None:
    _, errors = written(tmp_path, failed(3, custom_id="a"))
    assert errors[0]["response"] is None
    assert errors[0]["error"] == {"code": "engine_died", "message": "three times"}


@pytest.mark.parametrize("body", [b"", b'{"choices": [', b"<html>", b'{"a": "\xff"}', b'{"a": NaN}'])
def test_a_good_status_with_a_body_that_is_no_json_is_an_error(tmp_path: Path, body: bytes) -> None:
    output, errors = written(tmp_path, answered(0, body, custom_id="a"))
    assert output == []
    assert errors[0]["error"]["code"] == "invalid_answer"
    assert errors[0]["response"]["body"] == body.decode("utf-8", "replace")


def test_a_body_in_several_lines_becomes_one(tmp_path: Path) -> None:
    body = json.dumps(chat("two\nlines"), indent=2).replace("\n", "\r\n").encode()
    output, _ = written(tmp_path, answered(0, body))
    assert output[0]["response"]["body"] == chat("two\nlines")


def test_rows_without_custom_ids_are_named_by_their_numbers(tmp_path: Path) -> None:
    output, _ = written(tmp_path, answered(5))
    assert output[0]["custom_id"] == "row-5"
    answers = [answered(5, item=10 + sample, sample=sample) for sample in range(2)]
    output, _ = written(tmp_path, *answers, samples=2)
    assert [line["custom_id"] for line in output] == ["row-5-sample-0", "row-5-sample-1"]
    assert [line["id"] for line in output] == ["batch_req_10", "batch_req_11"]


def test_half_a_surrogate_pair_in_a_custom_id_is_no_reason_to_stop(tmp_path: Path) -> None:
    answers = [answered(0, custom_id="\ud800!"), failed(1, custom_id="b", error=("code", "\udcff"))]
    output, errors = written(tmp_path, *answers)
    assert (output[0]["custom_id"], errors[0]["error"]["message"]) == ("�!", "�")


def test_the_official_client_reads_the_bodies(tmp_path: Path) -> None:
    from openai.types.chat import ChatCompletion

    body = chat() | {"created": 1, "model": "m"}
    body["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    output, _ = written(tmp_path, answered(0, body))
    assert ChatCompletion.model_validate(output[0]["response"]["body"]).choices[0].message.content == "hello"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"message": "old style"}', "old style"),
        (b'{"error": "plain"}', "plain"),
        (b"Bad Gateway\n", "Bad Gateway"),
        (b"", "HTTP 502"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]'),
    ],
)
def test_the_message_of_an_error_is_found_in_all_its_forms(body: bytes, message: str) -> None:
    assert failure(answered(0, body, status=502)) == ("http_502", message)


@settings(max_examples=60)
@given(
    bodies=st.lists(
        st.binary(max_size=40) | st.text(max_size=20).map(lambda text: json.dumps(text).encode())
    ),
    status=st.sampled_from([0, 200, 400, 500]),
)
def test_every_answer_is_one_line_whatever_its_body_is(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[bytes], status: int
) -> None:
    answers = [answered(row, body, status=status) for row, body in enumerate(bodies)]
    output, errors = written(tmp_path_factory.mktemp("any"), *answers)
    ids = [line["id"] for line in output + errors]
    assert sorted(ids) == sorted(f"batch_req_{row}" for row in range(len(bodies)))


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left") as raised:
        written_to_full(tmp_path)
    assert raised.value.hint


def written_to_full(directory: Path) -> None:
    with OpenAIWriter(Path("/dev/full"), directory / "errors") as writer:
        for row in range(3):
            writer.write(answered(row, chat("x" * 900_000)))


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"can't write .*absent/output"):
        OpenAIWriter(tmp_path / "absent" / "output", tmp_path / "errors")
