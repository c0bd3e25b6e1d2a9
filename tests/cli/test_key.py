"""`hpcserve key` and `hpcserve usage`, as people type them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcserve.cli.main import main
from hpcserve.router.keys.ledger import Ledger
from hpcserve.router.keys.usage_file import UsageConfig

from .conftest import Answer

Command = Callable[..., Answer]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCSERVE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def hpcserve(runs: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> Answer:
        capsys.readouterr()
        status = main(words)
        seen = capsys.readouterr()
        return Answer(status=status, out=seen.out, err=seen.err)

    return run


def test_a_key_is_shown_once_on_stdout_and_nowhere_again(runs: Path, hpcserve: Command) -> None:
    made = hpcserve("key", "create", "alice", "--concurrent", "4", "--models", "a,b", "--priority", "batch")
    assert made.status == 0
    key = made.out.strip()
    assert key.startswith("hps-")
    assert key not in made.err
    listed = hpcserve("key", "list")
    assert key not in listed.out + listed.err
    assert "alice" in listed.out
    assert "4 at a time; only a, b; batch" in listed.out
    assert all(key[15:] not in path.read_text() for path in (runs / ".keys").iterdir())


def test_revoked_keys_stay_listed(hpcserve: Command) -> None:
    hpcserve("key", "create", "alice")
    hpcserve("key", "create", "alice")
    assert hpcserve("key", "revoke", "alice").err.count("revoked") == 2
    document = json.loads(hpcserve("key", "list", "--json").out)
    assert [bool(key["revoked"]) for key in document["keys"]] == [True, True]


def test_a_directory_can_be_named(tmp_path: Path, hpcserve: Command) -> None:
    assert hpcserve("key", "create", "bob", "--keys", str(tmp_path / "here")).status == 0
    assert len(list((tmp_path / "here").iterdir())) == 1
    assert "no keys in" in hpcserve("key", "list").err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("create",), 2, "needs a name"),
        (("create", "run"), 2, "can't be the name"),
        (("create", "../x"), 2, "can't be the name"),
        (("create", "a", "--weight", "0"), 2, "--weight"),
        (("create", "a", "--models", "a,,b"), 2, "--models"),
        (("create", "a", "--concurrent", "0"), 2, "--concurrent"),
        (("create", "a", "--json"), 2, "--json"),
        (("list", "a"), 2, "takes no name"),
        (("revoke", "a", "--weight", "2"), 2, "--weight"),
        (("revoke", "nobody"), 8, "nobody"),
        (("destroy", "a"), 2, "destroy"),
    ],
)
def test_what_is_wrong_is_said(hpcserve: Command, words: tuple[str, ...], status: int, said: str) -> None:
    answer = hpcserve("key", *words)
    assert answer.status == status
    assert said in answer.err
    assert answer.out == ""


def test_usage_is_printed_by_user_and_with_idle_hours(runs: Path, hpcserve: Command) -> None:
    assert "nothing was used yet" in hpcserve("usage").err
    clock = [1_700_000_000.0]
    config = UsageConfig(directory=str(runs / ".usage"), run="llama", gpus=4, started=clock[0])
    ledger = Ledger(config, now=lambda: clock[0])
    ledger.add([["k1", "alice", "m", 3, 1000, 400, 50], ["k2", "bob", "m", 1, 10, 0, 10]])
    clock[0] += 900.0
    ledger.tick(busy=True)
    clock[0] += 900.0
    ledger.tick(busy=False)
    ledger.close()
    lines = hpcserve("usage").out.splitlines()
    assert lines[0].split() == ["USER", "REQUESTS", "PROMPT", "CACHED", "WRITTEN", "GPU-HOURS"]
    assert lines[1].split() == ["alice", "3", "1,000", "400", "50", "0.94"]
    assert lines[-1].split() == ["(idle)", "1.00"]
    document = json.loads(hpcserve("usage", "--json", "--by", "key").out)
    assert document["idle_gpu_hours"] == pytest.approx(1.0)
    assert sum(row["gpu_hours"] for row in document["rows"]) == pytest.approx(1.0)
    assert not json.loads(hpcserve("usage", "--json", "--since", "1h").out)["rows"]
    assert hpcserve("usage", "--since", "yesterday").status == 2
