"""`hpcserve batch calibrate` on this machine, with fake engines."""

from __future__ import annotations

import json

import pytest

from .conftest import Answer, World
from .test_batch import FAST, SITE, TEMPLATE, written
from .test_batch_bad_inputs import everything
from .test_local_launch import nothing_left

pytestmark = pytest.mark.timeout(300)

COUNT = 80
WORDS = ("model.yaml", "data.jsonl", "-o", "cal", "--template", "t.j2", "--sampling", "max_tokens=4")


@pytest.fixture
def user(world: World) -> World:
    world.site("here", SITE)
    world.monkeypatch.setenv("HPCSERVE_SITE", "here")
    world.model.write_text(FAST + "nodes: 2\n")
    written(world.home / "data.jsonl", [{"q": f"question {number}"} for number in range(COUNT)])
    (world.home / "t.j2").write_text(TEMPLATE)
    return world


def calibrate(user: World, *more: str) -> Answer:
    return user("batch", "calibrate", *WORDS, *more)


def test_both_layouts_answer_the_same_rows_and_the_faster_one_is_named(user: World) -> None:
    answer = calibrate(user, "--sample", "50", "--json")
    assert answer.status == 0, answer.err
    told = json.loads(answer.out)
    assert [*told["layouts"]] == ["disaggregated", "aggregated"]
    assert all(one["rows"] == 50 and one["rows_per_second"] > 0 for one in told["layouts"].values())
    assert "on these rows" in told["verdict"]
    plans = {name: json.loads((user.runs / f"tiny-{name}/plan.json").read_text()) for name in told["layouts"]}
    roles = {name: [replica["role"] for replica in plan["replicas"]] for name, plan in plans.items()}
    assert roles == {"disaggregated": ["prefill", "decode"], "aggregated": ["aggregated", "aggregated"]}
    outputs = [(user.home / f"cal/{name}/output.jsonl").read_text().splitlines() for name in told["layouts"]]
    questions = [[json.loads(line)["q"] for line in lines] for lines in outputs]
    assert questions[0] == questions[1]
    assert len(set(questions[0])) == 50
    assert all(nothing_left(user.runs / f"tiny-{name}") for name in told["layouts"])

    # The same command has nothing more to do, and says the same.
    again = calibrate(user, "--sample", "50")
    assert again.status == 0, again.err
    assert again.out.splitlines()[-1] == told["verdict"]
    assert "submitted" not in again.err


def test_a_small_dataset_is_used_whole(user: World) -> None:
    answer = calibrate(user, "--json")
    assert answer.status == 0, answer.err
    assert {one["rows"] for one in json.loads(answer.out)["layouts"].values()} == {COUNT}


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("data.jsonl", "-o", "cal"), 2, "a calibration needs a model.yaml and a dataset"),
        (
            (*WORDS, "--nodes", "1"),
            4,
            "prefill and decode need one worker slot each, but the job has one node with 1",
        ),
        (("model.yaml", "none.jsonl", *WORDS[2:]), 3, "none.jsonl"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_job_is_submitted(
    user: World, words: tuple[str, ...], status: int, says: str
) -> None:
    before = everything(user.home)
    answer = user("batch", "calibrate", *words)
    assert answer.status == status, answer.err
    assert answer.err.startswith("error: ")
    assert says in answer.err
    assert "hint: " in answer.err
    assert everything(user.home) == before
