"""A live replay: prompts that mirror a trace's blocks, speeds that fit its clock, figures scaled back."""

from __future__ import annotations

import itertools
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from hpcserve.bench import processes
from hpcserve.bench.replay import synthetic
from hpcserve.bench.replay.engine import EngineModel
from hpcserve.bench.replay.live import compare, dynamo, figures, fleet, prompts
from hpcserve.bench.replay.live.player import Answer, note_usage
from hpcserve.bench.replay.live.report import table
from hpcserve.bench.replay.live.routers import ROUTERS, Front
from hpcserve.bench.replay.live.scale import Scale
from hpcserve.bench.replay.simulate import Setup
from hpcserve.bench.replay.trace import TraceRequest
from hpcserve.cli.main import main
from hpcserve.engines.fake_server import tokens
from hpcserve.errors import UsageError

SCALE = Scale(pace=10.0, prompt=4, answer=8)
MODEL = EngineModel(blocks=100, prefill_rate=8000.0, chunk=2048, step_base=0.01, step_per_answer=0.001)


def request(blocks, prompt, output=80, arrival=0.0):
    return TraceRequest(arrival=arrival, prompt_tokens=prompt, output_tokens=output, blocks=tuple(blocks))


def test_texts_share_words_exactly_as_far_as_prompts_share_blocks():
    first = prompts.text(request((0, 1, 2), 1400), SCALE).split(" ")
    second = prompts.text(request((0, 1, 9), 1536), SCALE).split(" ")
    assert (len(first), len(second)) == (350, 384)
    assert first[:256] == second[:256]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    # By chance the next block could begin with the same word.
    assert 256 <= sum(1 for _ in same) < 260


def test_a_word_is_one_token_of_the_fake_engine():
    assert len(set(prompts.WORDS)) == 256
    text = prompts.text(request((0, 1), 1024), SCALE)
    ids = tokens.encode(text)
    assert len(ids) == 256
    assert len({tuple(ids[:128]), tuple(ids[128:])}) == 2


def test_a_prompt_is_never_longer_than_its_blocks_nor_empty():
    assert len(prompts.text(request((0,), 900), SCALE).split(" ")) == 128
    assert prompts.text(request((0,), 1), SCALE) in prompts.WORDS


def test_an_engine_is_as_much_quicker_as_the_clock_and_works_on_as_much_less():
    # A prompt of the trace takes as long on either clock, …
    asked = request((0, 1, 2, 3), 2048, output=80)
    live = SCALE.prompt_tokens(asked) / SCALE.prefill_rate(MODEL)
    assert SCALE.trace_seconds(live) == pytest.approx(asked.prompt_tokens / MODEL.prefill_rate)
    # … and so does an answer, beside three others.
    step = SCALE.step_base(MODEL) + 4 * SCALE.step_per_answer(MODEL)
    assert SCALE.answer_tokens(asked) * SCALE.trace_seconds(step) == pytest.approx(80 * MODEL.step(4))
    assert SCALE.trace_itl(step) == pytest.approx(MODEL.step(4))
    assert SCALE.block_tokens == 128
    assert SCALE.step_tokens(MODEL) == 2048 * 8 // 4
    assert SCALE.answer_tokens(request((0,), 5, output=1)) == 1


def whole(first, last, late=0.0, **more):
    return Answer(first=first, last=last, late=late, tokens=11, failure=None, **more)


def test_figures_are_those_of_the_traces_clock():
    counted = [fleet.Counted(queried=300, hit=100, preempted=1), fleet.Counted(queried=100, hit=0)]
    answers = [
        # 1 s and 20 ms, 3 s, 1 s but 30 ms.
        whole(0.1, 0.1 + 10 * 0.016),
        whole(0.1, 0.1 + 10 * 0.016, late=0.2),
        whole(0.1, 0.1 + 10 * 0.024),
        Answer(tokens=11, failure="HTTP 500: no"),
    ]
    found = figures.figures(answers, SCALE, counted, 2)
    assert (found.requests, found.errors, found.failures) == (4, 1, {"HTTP 500: no": 1})
    assert found.good == 0.25
    assert found.ttft_p50 == pytest.approx(1.0)
    assert found.ttft_p99 == pytest.approx(3.0)
    assert found.itl_p50 == pytest.approx(0.020)
    assert found.itl_p99 == pytest.approx(0.030)
    assert found.hit_rate == 0.25
    assert found.hottest == pytest.approx(200 / 150)
    assert found.preempted == 1


def test_without_metrics_the_answers_say_what_was_cached_and_where():
    answers = [
        whole(0.1, 0.2, worker="7", prompt_tokens=100, cached_tokens=50),
        whole(0.1, 0.2, worker="7", prompt_tokens=100, cached_tokens=0),
        whole(0.1, 0.2, worker="8", prompt_tokens=100, cached_tokens=100),
    ]
    found = figures.figures(answers, SCALE, None, 2)
    assert found.hit_rate == 0.5
    assert found.hottest == 2.0
    assert found.preempted is None


def test_usage_of_a_streams_last_chunk():
    answer = Answer()
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    note_usage(b"data: " + json.dumps({"choices": [], "usage": usage}).encode(), answer)
    assert (answer.prompt_tokens, answer.cached_tokens) == (9, 4)
    note_usage(b'data: {"choices":[],"usage":{"prompt_tokens":3,"prompt_tokens_details":null}}', answer)
    assert (answer.prompt_tokens, answer.cached_tokens) == (3, 0)


def test_what_an_engine_counted_is_read_off_its_metrics():
    text = (
        "# HELP vllm:prefix_cache_hits_total hits\n"
        'vllm:prefix_cache_queries_total{engine="0",model_name="mock"} 7713.0\n'
        'vllm:prefix_cache_hits_total{engine="0",model_name="mock"} 4864.0\n'
        'vllm:num_preemptions_total{engine="0",model_name="mock"} 2.0\n'
    )
    counted = fleet.parse(text)
    assert counted == fleet.Counted(queried=7713, hit=4864, preempted=2)
    assert counted - counted == fleet.Counted()


def test_an_engine_whose_port_was_taken_is_not_waited_for(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = processes.start([sys.executable, "-c", "exit(1)"], directory=tmp_path, log=log)
        try:
            assert not fleet._up(fleet.FakeEngine(port=1, events=2, replay=3), process)
        finally:
            processes.end(process)


def test_every_router_is_told_of_every_engine(tmp_path):
    engines = [fleet.FakeEngine(port=1, events=2, replay=3), fleet.FakeEngine(port=4, events=5, replay=6)]
    for router in ROUTERS:
        folder = tmp_path / router.name
        folder.mkdir()
        front = Front(
            executable="x", directory=folder, port=9, engines=engines,
            setup=Setup(workers=2, engine=MODEL), scale=SCALE,
        )  # fmt: skip
        command = router.command(front)
        said = " ".join(command.argv) + " ".join(path.read_text() for path in folder.glob("*.json"))
        if router.own_engines:
            (mocker,) = command.beside
            assert mocker[mocker.index("--num-workers") + 1] == "2"
            assert mocker[mocker.index("--num-gpu-blocks-override") + 1] == "100"
            assert mocker[mocker.index("--block-size") + 1] == "128"
            assert (folder / "model" / "tokenizer.json").is_file()
        else:
            assert all(engine.url in said for engine in engines)
        assert ("tcp://127.0.0.1:5" in said) == (router.name in ("hpcserve kv", "vllm-router kv_aware"))


def test_dynamos_mocker_is_as_quick_as_the_fake_engines(tmp_path):
    path = tmp_path / "speeds.npz"
    dynamo.write_speeds(path, MODEL, SCALE)
    with zipfile.ZipFile(path) as file:
        assert sorted(file.namelist()) == [
            "decode_active_kv_tokens.npy", "decode_context_length.npy", "decode_itl.npy",
            "prefill_isl.npy", "prefill_ttft_ms.npy",
        ]  # fmt: skip
        raw = file.read("prefill_ttft_ms.npy")
    assert raw.startswith(b"\x93NUMPY\x01\x00")
    assert (10 + int.from_bytes(raw[8:10], "little")) % 64 == 0
    numpy = pytest.importorskip("numpy")
    with numpy.load(path) as table_:
        rate = table_["prefill_isl"][1] / table_["prefill_ttft_ms"][1] * 1e3
        assert rate == pytest.approx(SCALE.prefill_rate(MODEL))
        assert table_["decode_itl"].shape == (96, 96)
        assert table_["decode_itl"].min() == pytest.approx(
            1e3 * (SCALE.step_base(MODEL) + SCALE.step_per_answer(MODEL))
        )


def test_a_router_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no router is called 'best'"):
        compare.compare(synthetic.agents(2), Setup(workers=1), SCALE, only=("best",), log=tmp_path / "log")


def test_the_table_says_who_is_not_installed_or_failed():
    document = {
        "routers": {"a": None, "b": {"failed": "b did not come up"}},
        "simulated": {},
        "bounds": {"one shared cache": 0.263},
        "setup": {
            "workers": 8,
            "engine": {"blocks": 2000},
            "scale": {"pace": 8.0, "prompt": 4, "answer": 8},
        },
        "trace": {"requests": 5, "seconds": 1.0},
    }
    lines = table(document).splitlines()
    assert lines[1].split() == ["a", "not", "installed"]
    assert "b did not come up" in lines[2]
    assert "one shared cache 26.3 %" in "\n".join(lines)


def test_our_router_before_two_fake_engines(tmp_path, capsys):
    output = tmp_path / "live.json"
    arguments = ["--synthetic", "agents", "--requests", "40", "--workers", "2", "--pace", "20"]
    arguments += ["--live", "--only", "hpcserve kv", "-o", str(output)]
    assert main(["bench", "replay", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("hpcserve kv ")
    found = json.loads(output.read_text())
    figures_ = found["routers"]["hpcserve kv"]
    assert (figures_["requests"], figures_["errors"], figures_["failures"]) == (40, 0, {})
    # Eight blocks of each prompt are the tools that all of them share.
    assert figures_["hit_rate"] > 0.2
    assert 1.0 <= figures_["hottest"] <= 2.0
    assert found["simulated"]["hpcserve kv"]["policy"] == "kv"
    assert not _left()


def _left() -> list[str]:
    """Children of this process that still run the fake engine or the router."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in children]
    return [line for line in lines if "fake_server" in line or "hpcserve.router" in line]
