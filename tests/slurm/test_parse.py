from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcserve.errors import SlurmDown, SlurmError
from hpcserve.slurm import parse
from hpcserve.slurm.nodelist import expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("n[1-3,07],m1", ("n1", "n2", "n3", "n07", "m1")),
        ("n[1-2,5],login", ("n1", "n2", "n5", "login")),
        ("gpu-[008-011]", ("gpu-008", "gpu-009", "gpu-010", "gpu-011")),
        ("r[1-2]n[01-02]", ("r1n01", "r1n02", "r2n01", "r2n02")),
        ("jwb[0097,0129]-ib", ("jwb0097-ib", "jwb0129-ib")),
        ("nid[999-1001]", ("nid999", "nid1000", "nid1001")),
        ("", ()),
    ],
)
def test_a_host_list_becomes_names_in_slurms_order(text: str, names: tuple[str, ...]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n]1[", "n[a-b]", "n[[1]]", "n[1,,2]"])
def test_text_that_is_no_host_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host list"):
        expand(text)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 4))
def test_a_range_has_as_many_names_as_it_says(low: int, count: int, width: int) -> None:
    last = low + count - 1
    names = expand(f"n[{low:0{width}}-{last:0{width}}]")
    assert len(set(names)) == count
    assert [int(name[1:]) for name in names] == list(range(low, last + 1))


def test_the_job_id_is_found_below_what_a_site_prints() -> None:
    assert parse.job_id("4711\n") == "4711"
    assert parse.job_id("4711;cluster-a\n") == "4711"
    assert parse.job_id("-----\nWelcome to Foo, 3 projects\n-----\n4711\n") == "4711"


def test_no_job_id_is_an_error_that_shows_the_text() -> None:
    with pytest.raises(SlurmError, match="Submitted to the moon"):
        parse.job_id("Submitted to the moon\n")


def test_squeue_lines_become_states() -> None:
    jobs = parse.squeue(
        "101|PENDING|1790000000|N/A||Priority\n"
        "102|RUNNING|1790000100|1790003700|n[1-2]|None\n"
        "103|PENDING|N/A|N/A||ReqNodeNotAvail, UnavailableNodes:n[3-4]\n"
        "104|COMPLETING|1790000100|1790000200|n3|NonZeroExitCode\n"
    )
    assert jobs["101"].phase == "queued"
    assert jobs["101"].start == 1790000000
    assert "higher priority" in jobs["101"].words
    assert jobs["102"].nodes == ("n1", "n2")
    assert jobs["102"].end == 1790003700
    assert jobs["102"].reason == ""
    assert jobs["103"].start is None
    assert "down, drained or reserved" in jobs["103"].words
    assert jobs["104"].phase == "ending"
    assert not jobs["104"].over


# Of Slurm 22.05, which does not keep the order of the components.
HET = "1+1|RUNNING|1790000000|1790003600|n[1-2]|None\n1+0|RUNNING|1790000000|1790003600|n3|None\n"


def test_components_of_a_heterogeneous_job_are_one_job() -> None:
    jobs = parse.squeue(HET + "4|PENDING|N/A|N/A||Priority\n")
    assert set(jobs) == {"1", "4"}
    assert (jobs["1"].job_id, jobs["1"].state, jobs["1"].nodes) == ("1", "RUNNING", ("n3", "n1", "n2"))


def test_a_heterogeneous_job_is_over_when_all_its_components_are() -> None:
    headless = HET.replace("1+0|RUNNING", "1+0|NODE_FAIL")
    assert parse.squeue(headless)["1"].phase == "ending"
    ended = headless.replace("1+1|RUNNING", "1+1|CANCELLED")
    assert parse.squeue(ended)["1"].state == "NODE_FAIL"
    lost_one = HET.replace("1+1|RUNNING", "1+1|NODE_FAIL")
    assert parse.squeue(lost_one)["1"].phase == "running"


def test_the_component_that_can_never_start_says_why_the_others_wait() -> None:
    waits = "1+0|PENDING|N/A|N/A||Resources\n1+1|PENDING|N/A|N/A||PartitionNodeLimit\n"
    assert "more nodes than the partition allows" in parse.squeue(waits)["1"].words


def test_iso_times_are_read_as_local_time() -> None:
    # Slurm before 20.02 ignores SLURM_TIME_FORMAT=%s in some commands.
    assert parse.time_of("2026-11-21T01:02:03") == pytest.approx(parse.time_of("2026-11-21T01:02:04"), abs=1)
    assert parse.time_of("Unknown") is None
    assert parse.time_of("N/A") is None


def test_lines_of_another_shape_are_not_taken_for_jobs() -> None:
    assert parse.squeue("") == {}
    assert list(parse.squeue("Welcome to the cluster\n\n|||\n42|RUNNING|1|2|n1|None\n")) == ["42"]
    with pytest.raises(SlurmDown, match="something else than jobs"):
        parse.squeue("Welcome to the cluster\n\n|||\n")
    assert parse.sacct("a|b|c\n") == {}


def test_sacct_lines_become_states_with_exit_codes() -> None:
    jobs = parse.sacct(
        "7|CANCELLED by 1000|1790000000|1790000100|n[1-2]|0:15\n"
        "8|FAILED|1790000000|1790000100|n1|6:0\n"
        "9|COMPLETED|1790000000|1790000100|n1|0:0\n"
        "10|CANCELLED by 0|Unknown|1790000100|None assigned|0:0\n"
    )
    assert jobs["7"].state == "CANCELLED"
    assert jobs["7"].exit_code == 143
    assert jobs["8"].exit_code == 6
    assert jobs["9"].phase == "done"
    assert jobs["10"].nodes == ()


def test_of_a_requeued_job_the_last_attempt_counts() -> None:
    jobs = parse.sacct("7|NODE_FAIL|1|2|n1|1:0\n7|RUNNING|3|Unknown|n2|0:0\n")
    assert jobs["7"].state == "RUNNING"
