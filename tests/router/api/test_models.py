"""Several models, and adapters, behind one router."""

from __future__ import annotations

import msgspec
import pytest

from hpcserve.http.errors import HttpError
from hpcserve.router import form
from hpcserve.router.control import Table
from hpcserve.router.keys.identity import Identity, Limits


def announce(bench, **models):
    """`aggregated_0=("a", "a-lora")`: the first is the model, the others are adapters of it."""
    specs = []
    for name, served in models.items():
        spec = bench[name.replace("_", "-")].spec
        cards = [{"id": served[0], "max_model_len": 64}]
        cards += [{"id": adapter, "parent": served[0]} for adapter in served[1:]]
        specs.append(msgspec.structs.replace(spec, models=tuple(cards)))
    bench.router.update(Table(state="ready", workers=tuple(specs)))


async def test_request_goes_to_a_worker_of_its_model_and_nowhere_else(start):
    bench = await start("aggregated-0", "aggregated-1", "aggregated-2", served_name="a")
    announce(bench, aggregated_0=("a",), aggregated_1=("a",), aggregated_2=("b",))
    for model in ("a", "b") * 6:
        assert (await bench.json("/v1/completions", {"model": model, "prompt": "x"}))["model"] == model
    for name, models in {"aggregated-0": {"a"}, "aggregated-1": {"a"}, "aggregated-2": {"b"}}.items():
        assert {seen.body["model"] for seen in bench[name].seen} == models


async def test_adapters_are_models_of_the_workers_that_list_them(start):
    bench = await start("aggregated-0", "aggregated-1", served_name="a")
    announce(bench, aggregated_0=("a", "poems"), aggregated_1=("a",))
    for _ in range(4):
        await bench.json("/v1/completions", {"model": "poems", "prompt": "x"})
    assert len(bench["aggregated-0"].seen) == 4 and not bench["aggregated-1"].seen
    # The adapter is gone: its name is unknown from the next announcement on.
    announce(bench, aggregated_0=("a",), aggregated_1=("a",))
    status, error = await bench.error("/v1/completions", {"model": "poems", "prompt": "x"})
    assert (status, error["code"]) == (404, "model_not_found")


async def test_models_are_listed_as_their_engines_describe_them(start):
    bench = await start("aggregated-0", "aggregated-1", served_name="a")
    announce(bench, aggregated_0=("a", "poems"), aggregated_1=("b",))
    listed = {entry["id"]: entry for entry in (await bench.json("/v1/models", method="GET"))["data"]}
    assert set(listed) == {"a", "poems", "b"}
    assert listed["a"]["max_model_len"] == 64 and listed["poems"]["parent"] == "a"
    assert (await bench.json("/v1/models/poems", method="GET"))["parent"] == "a"
    assert (await bench.error("/v1/models/c", method="GET"))[0] == 404


async def test_unknown_or_missing_model_is_told_what_there_is(start):
    bench = await start("aggregated-0", "aggregated-1", served_name="a")
    announce(bench, aggregated_0=("a", "poems"), aggregated_1=("b",))
    status, error = await bench.error("/v1/completions", {"model": "c", "prompt": "x"})
    assert status == 404 and "served: a, poems, b" in error["message"]
    status, error = await bench.error("/v1/completions", {"prompt": "x"})
    assert (status, error["code"]) == (400, "model_required")
    status, error = await bench.error("/v1/completions", {"model": 7, "prompt": "x"})
    assert status == 400 and "string" in error["message"]
    announce(bench, aggregated_0=("a",), aggregated_1=("a",))
    assert await bench.json("/v1/completions", {"prompt": "x", "model": None})


async def test_one_model_may_be_disaggregated_and_another_not(start):
    bench = await start("prefill-0", "decode-0", "aggregated-0", served_name="a")
    announce(bench, prefill_0=("a",), decode_0=("a",), aggregated_0=("b",))
    await bench.json("/v1/completions", {"model": "a", "prompt": "x"})
    await bench.json("/v1/embeddings", {"model": "b", "input": "x"})
    assert len(bench["prefill-0"].seen) == len(bench["decode-0"].seen) == len(bench["aggregated-0"].seen) == 1


async def test_key_for_some_models_hears_of_no_others(start):
    bench = await start("aggregated-0", "aggregated-1", served_name="a")
    announce(bench, aggregated_0=("a", "poems"), aggregated_1=("b",))
    limited = Identity(key="k1", name="ada", limits=Limits(models=frozenset({"b"})))
    bench.router.keyring.identify = lambda exchange: limited
    listed = await bench.json("/v1/models", method="GET")
    assert [entry["id"] for entry in listed["data"]] == ["b"]
    assert (await bench.json("/v1/completions", {"model": "b", "prompt": "x"}))["model"] == "b"
    assert (await bench.error("/v1/completions", {"model": "a", "prompt": "x"}))[0] == 403
    assert (await bench.error("/v1/models/a", method="GET"))[0] == 403
    _, error = await bench.error("/v1/completions", {"model": "c", "prompt": "x"})
    assert error["message"].endswith("served: b")


async def test_sound_is_refused_when_its_form_names_no_model_served_here(start):
    bench = await start("aggregated-0", "aggregated-1", served_name="a")
    announce(bench, aggregated_0=("a",), aggregated_1=("b",))

    status, error = await bench.error("/v1/audio/transcriptions", _body(b"c"), content_type=_TYPE)
    assert status == 404 and "served: a, b" in error["message"]
    assert not any(stub.seen for stub in bench.stubs.values())


_TYPE = 'multipart/form-data; boundary="--x y"'


def _body(model: bytes, *, before: bytes = b"", boundary: bytes = b"--x y") -> bytes:
    sound = b'--x\r\n\r\nContent-Disposition: form-data; name="model"\r\n\r\nnot me' + bytes(range(256))
    parts = [b'form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n' + sound]
    if before:
        parts.append(b'form-data; name="model"\r\n\r\n' + before)
    parts.append(b'form-data; name="model"\r\n\r\n' + model)
    lines = [b"--" + boundary + b"\r\nContent-Disposition: " + part for part in parts]
    return b"\r\n".join([*lines, b"--" + boundary + b"--\r\n"])


def test_form_field_is_read_past_what_a_file_contains():
    assert form.field(_body(b"whisper"), _TYPE.encode(), b"model") == "whisper"
    assert form.field(_body(b"whisper"), _TYPE.encode(), b"stream") is None


@pytest.mark.parametrize(
    "body, kind",
    [
        (_body(b"a", before=b"b"), _TYPE), (_body(b"a")[:-40], _TYPE), (b"", _TYPE),
        (_body(b"a"), "multipart/x"), (_body(b"\xff"), _TYPE), (b"--" + _body(b"a"), _TYPE),
        (_body(b"a"), "multipart/form-data; boundary=z"),
    ],
    ids=["twice", "cut off", "empty", "no boundary", "not UTF-8", "shifted", "other boundary"],
)  # fmt: skip
def test_broken_forms_are_refused(body, kind):
    with pytest.raises(HttpError) as refused:
        form.field(body, kind.encode(), b"model")
    assert refused.value.status == 400
