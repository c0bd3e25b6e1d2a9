"""`ls`, `status`, `logs`, `connect`, `chat` and `stop` of runs that exist."""

from __future__ import annotations

import json
import time

import pytest

from hpcserve import control
from hpcserve.cli import logs

from .conftest import World
from .jobs import RUNNING, answering, becomes_ready, head, secret, submit, writes, writes_events


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_TIMEOUT", 2.0)
    monkeypatch.setattr(logs, "_GLANCE", 0.01)
    monkeypatch.setattr(logs, "_ENDED_EVERY", 0.01)


def test_ls_of_nothing_names_the_first_command(world: World) -> None:
    answer = world("ls")
    assert (answer.status, answer.out) == (0, "")
    assert "hpcserve launch" in answer.err


def test_ls_shows_every_run_newest_first_with_one_squeue(world: World) -> None:
    submit(world, "first", becomes_ready())
    world.slurm.accepts(43)
    submit(world, "second")
    world.slurm.shows(RUNNING, "43|PENDING|N/A|N/A||Resources")
    before = len(world.slurm.calls("squeue"))
    answer = world("ls")
    lines = [line.split() for line in answer.out.splitlines()]
    assert [line[0] for line in lines] == ["NAME", "second", "first"]
    assert "queued" in lines[1]
    assert "ready" in lines[2]
    assert len(world.slurm.calls("squeue")) == before + 1


def test_ls_as_json(world: World) -> None:
    submit(world, "first", becomes_ready())
    [run] = json.loads(world("ls", "--json").out)["runs"]
    assert run["name"] == "first"
    assert run["state"] == "ready"
    assert run["nodes"] == 4
    assert run["model"] == "tiny"


def test_status_shows_the_fabric_with_reasons(world: World) -> None:
    submit(world)
    answer = world("status", "eval", "--fabric")
    assert answer.status == 8
    assert "has no fabric.json: its nodes have not met yet" in answer.err
    seen = {
        "network": "infiniband",
        "nodes": [{
            "node": "n1", "rank": 0, "interface": "ib0", "leaf": "b8", "slingshot": [],
            "nvlink_domain": None, "nvlink_trouble": None, "imex": {"channels": [0], "status": "UP"},
            "gpus": [{"index": 0, "name": "X", "numa": 1, "ports": ["mlx5_4:1"], "relation": "NODE",
                      "lost": ["mlx5_0:1: it is DOWN (Polling)"]}],
            "ports": [{"name": "mlx5_4:1", "link_layer": "InfiniBand", "state": "ACTIVE (LinkUp)", "numa": 1,
                       "rate_gbps": 400.0, "gid_index": None, "used": True, "why": "a rail"}],
        }],
        "replicas": [{"replica": "decode-0", "node": "n1", "kv_over_nvlink": False, "settings": [
            {"name": "UCX_NET_DEVICES", "value": "mlx5_4:1", "why": "active ports nearest to its GPUs"},
        ]}],
    }  # fmt: skip
    (world.runs / "eval" / "fabric.json").write_text(json.dumps(seen))
    told = world("status", "eval", "--fabric").out
    assert "mlx5_4:1 (lost: mlx5_0:1: it is DOWN (Polling))" in told
    assert "channels 0, UP" in told
    assert ["decode-0", "n1", "UCX_NET_DEVICES", "mlx5_4:1"] in [
        line.split()[:4] for line in told.splitlines()
    ]
    assert json.loads(world("status", "eval", "--fabric", "--json").out)["replicas"] == seen["replicas"]


def test_status_repeats_the_warnings_of_the_run(world: World) -> None:
    submit(world, job=writes_events({"event": "warning", "message": "KV over TCP", "hint": "ask ibstat"}))
    answer = world("status", "eval")
    assert answer.status == 0
    assert "warning: KV over TCP" in answer.err
    assert "hint: ask ibstat" in answer.err


def test_ls_still_lists_when_slurm_is_down(world: World) -> None:
    submit(world)
    world.slurm.is_down()
    answer = world("ls")
    assert answer.status == 0
    assert "unknown" in answer.out
    assert "Unable to contact" in answer.err


def test_a_requeued_run_is_not_called_ready_because_it_once_was(world: World) -> None:
    submit(world, job=becomes_ready() + writes_events({"event": "job-started", "node": "n9"}))
    assert json.loads(world("ls", "--json").out)["runs"][0]["state"] == "starting"
    assert world("connect", "eval").status == 8


def test_ls_does_not_ask_about_runs_that_said_how_they_ended(world: World) -> None:
    submit(world, job=writes_events({"event": "stopped", "reason": "asked to"}))
    before = len(world.slurm.calls("squeue"))
    assert "stopped" in world("ls").out
    assert len(world.slurm.calls("squeue")) == before


def test_a_broken_site_config_does_not_hide_the_other_runs(world: World) -> None:
    submit(world)
    world.site("broken", "nonsense: [")
    answer = world("ls")
    assert "eval" in answer.out
    assert "broken.yaml" in answer.err


def test_hpcserve_runs_is_the_only_place_looked_at_when_set(world: World) -> None:
    submit(world)
    world.monkeypatch.setenv("HPCSERVE_RUNS", str(world.home / "elsewhere"))
    assert world("ls").out == ""
    submit(world, "other")
    assert (world.home / "elsewhere/other/run.json").exists()


def test_a_run_is_found_by_name_beginning_and_job_id(world: World) -> None:
    submit(world, "evaluation")
    for text in ("evaluation", "eval", "42"):
        assert world("status", text).status == 0


def test_an_ambiguous_beginning_names_the_candidates(world: World) -> None:
    submit(world, "eval-a")
    submit(world, "eval-b")
    answer = world("status", "eval-")
    assert answer.status == 8
    assert "`eval-a`" in answer.err
    assert "`eval-b`" in answer.err


def test_a_misspelled_run_names_the_nearest(world: World) -> None:
    submit(world, "evaluation")
    assert "did you mean `evaluation`?" in world("status", "evalution").err


def test_status_comes_from_the_controller(world: World) -> None:
    submit(world, job=becomes_ready())
    status = {
        "state": "ready",
        "replicas": [
            {
                "name": "decode-0",
                "state": "ready",
                "node": "n3",
                "restarts": 2,
                "url": "http://10.0.0.3:1",
                "failure": None,
                "progress": None,
                "in_rotation": True,
                "reason": None,
            },
            {
                "name": "decode-1",
                "state": "lost",
                "node": "n4",
                "restarts": 0,
                "url": None,
                "failure": None,
                "progress": None,
                "in_rotation": False,
                "reason": "no heartbeat from n4",
            },
        ],
    }
    with answering(secret(world, "job-key"), status) as (port, asked):
        head(world, port)
        answer = world("status", "eval")
        document = json.loads(world("status", "eval", "--json").out)
    assert asked == ["GET /status", "GET /status"]
    assert "is ready" in answer.out
    assert "no heartbeat from n4" in answer.out
    assert document["source"] == "controller"
    assert document["controller"]["state"] == "ready"


def test_status_falls_back_to_the_files_and_says_so(world: World) -> None:
    submit(world, job=becomes_ready())
    head(world, 1)
    answer = world("status", "eval")
    assert answer.status == 0
    assert "does not answer" in answer.err
    assert "READY: http://127.0.0.1:20000/v1" in answer.out
    assert json.loads(world("status", "eval", "--json").out)["source"] == "files"


def test_status_of_a_failed_run_says_why_and_where_to_look(world: World) -> None:
    submit(world, job=writes_events({"event": "failed", "message": "decode-0 found no GPU", "exit_code": 6}))
    answer = world("status", "eval")
    assert "is failed: decode-0 found no GPU" in answer.out
    assert "hpcserve logs eval" in answer.out


def test_status_of_a_waiting_run_has_the_reason(world: World) -> None:
    submit(world, shows="42|PENDING|N/A|N/A||QOSMaxJobsPerUserLimit")
    assert "all that this QOS gives" in world("status", "eval").out


def test_connect_prints_the_block_and_json(world: World) -> None:
    submit(world, job=becomes_ready(key_file="/x/api-key"))
    assert "ssh -N -L" in world("connect", "eval").out
    document = json.loads(world("connect", "eval", "--json").out)
    assert document["endpoint"]["key_file"] == "/x/api-key"


def test_connect_before_ready_says_how_far_it_is(world: World) -> None:
    submit(world)
    answer = world("connect", "eval")
    assert answer.status == 8
    assert "it is starting" in answer.err
    assert "hpcserve status eval" in answer.err


def test_connect_after_the_end_does_not_give_a_dead_address(world: World) -> None:
    submit(world, job=becomes_ready(), shows="42|TIMEOUT|1790000000|1790003600|n[1-4]|TimeLimit")
    answer = world("connect", "eval")
    assert answer.status == 8
    assert "end of its walltime" in answer.err


def test_chat_streams_an_answer_with_the_key_from_its_file(world: World) -> None:
    submit(world)
    with answering(secret(world, "api-key")) as (port, asked):
        key_file = str(world.runs / "eval/secrets/api-key")
        submit(world, "again", becomes_ready(f"http://127.0.0.1:{port}/v1", key_file=key_file))
        answer = world("chat", "again", "What is the capital of France?")
    assert (answer.status, answer.out) == (0, "The capital is Paris.\n")
    body = json.loads(asked[0])
    assert body["model"] == "tiny"
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_without_an_endpoint_that_answers_is_an_error(world: World) -> None:
    submit(world, job=becomes_ready("http://127.0.0.1:1/v1"))
    answer = world("chat", "eval", "hello")
    assert answer.status == 8
    assert "does not answer" in answer.err


def test_chat_with_the_wrong_key_says_so(world: World) -> None:
    with answering("hs-right") as (port, _):
        submit(world, job=becomes_ready(f"http://127.0.0.1:{port}/v1"))
        answer = world("chat", "eval", "hello")
    assert answer.status == 8
    assert "401: wrong key" in answer.err


def test_logs_are_interleaved_by_time_and_prefixed(world: World) -> None:
    submit(
        world,
        job=writes("logs/agent-0.log", "2026-11-21 01:00:02,000 two\n  a second line of two\n")
        + writes("logs/decode-0.n3.log", "INFO 11-21 01:00:01 one\nINFO 11-21 01:00:03 three\n"),
    )
    world.monkeypatch.setattr(logs.time, "localtime", lambda: time.struct_time((2026,) + (1,) * 8))
    lines = world("logs", "eval").out.splitlines()
    labels = [line.split("|")[0].strip() for line in lines]
    assert labels == ["decode-0.n3", "agent-0", "agent-0", "decode-0.n3"]
    assert lines[2].endswith("  a second line of two")


def test_logs_can_be_narrowed(world: World) -> None:
    names = ["job", "head", "router", "agent-0", "agent-1", "prefill-0.n1", "decode-0.n3", "decode-1.n4"]
    submit(world, job="".join(writes(f"logs/{name}.log", f"{name}\n") for name in names))

    def labels(*words: str) -> list[str]:
        return sorted(line.split("|")[0].strip() for line in world("logs", "eval", *words).out.splitlines())

    assert labels("--role", "decode") == ["decode-0.n3", "decode-1.n4"]
    assert labels("--role", "agent", "--rank", "1") == ["agent-1"]
    assert labels("--rank", "0") == ["agent-0", "prefill-0.n1"]
    assert labels("--replica", "decode-1") == ["decode-1.n4"]
    assert len(labels()) == 8


def test_logs_as_json_say_whose_each_line_is(world: World) -> None:
    submit(world, job=writes("logs/decode-0.n3.log", 'a "quoted" line\n') + writes("logs/agent-1.log", "b\n"))
    lines = [json.loads(line) for line in world("logs", "eval", "--json").out.splitlines()]
    told = {line["log"]: (line["role"], line["rank"], line["replica"], line["line"]) for line in lines}
    assert told == {
        "decode-0.n3": ("decode", None, "decode-0", 'a "quoted" line'),
        "agent-1": ("agent", 1, None, "b"),
    }


def test_logs_of_a_run_without_any_say_where_they_would_be(world: World) -> None:
    submit(world)
    answer = world("logs", "eval", "--role", "decode")
    assert answer.status == 8
    assert str(world.runs / "eval/logs") in answer.err


def test_following_ends_with_the_run_and_misses_nothing(world: World) -> None:
    old = "".join(f"line {number}\n" for number in range(30))
    submit(world, job=writes("logs/head.log", old), shows="42|COMPLETED|1|2|n1|None")
    out = world("logs", "-f", "eval").out.splitlines()
    assert [line.split("| ")[1] for line in out] == [f"line {number}" for number in range(20, 30)]


def test_stop_drains_through_the_controller_then_forces(world: World) -> None:
    submit(world, job=becomes_ready())
    with answering(secret(world, "job-key")) as (port, asked):
        head(world, port)
        first = world("stop", "eval", "--wait", "0")
        assert asked == ["POST /drain"]
        assert world.slurm.calls("scancel") == []
        second = world("stop", "eval", "--wait", "0")
    assert asked == ["POST /drain", "POST /stop"]
    assert world.slurm.calls("scancel") == ["scancel 42"]
    assert "drains" in first.err
    assert "call again" in first.err
    assert "ending it now" in second.err
    assert (first.status, second.status) == (0, 0)


def test_stop_signals_the_script_when_the_controller_is_unreachable(world: World) -> None:
    submit(world, job=becomes_ready())
    head(world, 1)
    answer = world("stop", "eval", "--wait", "0")
    assert world.slurm.calls("scancel") == ["scancel --signal=TERM --batch 42"]
    assert "by signal" in answer.err


def test_stop_takes_a_waiting_job_out_of_the_queue(world: World) -> None:
    submit(world, shows="42|PENDING|N/A|N/A||Priority")
    answer = world("stop", "eval", "--wait", "0", "--json")
    assert world.slurm.calls("scancel") == ["scancel 42"]
    assert json.loads(answer.out)["action"] == "cancelled"


def test_stop_waits_until_the_job_is_gone(world: World) -> None:
    submit(world, job=becomes_ready())
    head(world, 1)
    world.slurm.says("scancel", "")
    gone = world.slurm.directory / "squeue.out"
    hook = f"echo '42|CANCELLED|1|2|n1|None' > {gone}\n"
    (world.slurm.directory / "scancel.hook").write_text(hook)
    answer = world("stop", "eval")
    assert answer.status == 0
    assert "eval is over" in answer.err


def test_stopping_a_run_that_is_over_changes_nothing(world: World) -> None:
    submit(world, shows="42|COMPLETED|1|2|n1|None")
    before = world.files()
    for _ in range(2):
        answer = world("stop", "eval")
        assert answer.status == 0
        assert "over already" in answer.err
    assert world.slurm.calls("scancel") == []
    assert world.files() == before


def test_stop_forces_a_job_that_failed_but_did_not_end(world: World) -> None:
    submit(world, job=writes_events({"event": "failed", "message": "no", "exit_code": 6}))
    world("stop", "eval", "--wait", "0")
    assert world.slurm.calls("scancel") == ["scancel 42"]


def test_a_local_run_of_another_host_is_not_called_over(world: World) -> None:
    submit(world)
    path = world.runs / "eval/run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "scheduler": "local", "job_id": "local-1-1", "host": "far-away"}))
    assert "it is on far-away" in world("ls").out
    assert "far-away" in world("stop", "eval").err
