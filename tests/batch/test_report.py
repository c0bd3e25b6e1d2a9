"""What a batch cost: the arithmetic of its report, its advice and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from hpcserve.batch import plot, pools
from hpcserve.batch.admission import EngineLoad
from hpcserve.batch.course import MOST_POINTS, Course, Point
from hpcserve.batch.history import Part
from hpcserve.batch.manifest import Manifest
from hpcserve.batch.merge import Merged
from hpcserve.batch.pools import Use
from hpcserve.batch.report import make_report, text

HOUR = 3600.0
PART = Part(
    member="7.0-head-1-1", slurm_job="7", gpus=16, job_began=0.0, began=HOUR, first_result=1.1 * HOUR,
    tail=5 * HOUR, last_result=5.5 * HOUR, ended=6 * HOUR, how="complete", results=1000, errors=10,
    prompt_tokens=3_000_000, output_tokens=1_000_000, cpu_seconds=2.0, memory_bytes=1 << 28,
    attempts={"1": 1000}, finish_reasons={"stop": 990}, retries={}, units_per_gpu_hour=0.5,
    pools={"prefill": Use(100, 60, 5, 50.0), "decode": Use(200, 0, 180, 6400.0)},
    course=[Point(HOUR, 0, 0), Point(3 * HOUR, 500, 1_800_000), Point(6 * HOUR, 1000, 4_000_000)],
)  # fmt: skip


class _Manifest:
    rows = 1000


def report(*parts: Part) -> dict[str, Any]:
    merged = Merged(items=1000, failed=10, results=1001, output=Path("out/output.jsonl"), errors=None)
    manifest: Manifest = _Manifest()  # type: ignore[assignment]
    return make_report(manifest, merged, parts)


def test_gpu_hours_are_split_by_what_they_went_into() -> None:
    found = report(PART)
    assert found["gpu_hours"] == {"load": 16, "steady": 64, "tail": 8, "drain": 8, "total": 96}
    assert found["service_units"] == 48
    assert found["gpu_hours_per_million_output_tokens"] == 96
    assert found["gpu_hours_per_million_tokens"] == 24
    assert found["rows_per_gpu_hour"] == pytest.approx(1000 / 96, abs=1e-3)
    assert found["driver_cpu_ms_per_row"] == 2
    assert "driver          2.00 ms of CPU time a row" in text(found)
    assert found["computed_more_than_once"] == 1


def test_a_site_without_a_rate_has_no_service_units() -> None:
    other = msgspec.structs.replace(PART, units_per_gpu_hour=None)
    assert report(PART, other)["service_units"] is None
    assert "service units" not in text(report(PART, other))
    assert "service units   48.0" in text(report(PART))
    on_an_endpoint = msgspec.structs.replace(other, gpus=0)
    assert report(PART, on_an_endpoint)["service_units"] == 48


def test_the_pools_of_all_jobs_are_added_up() -> None:
    found = report(PART, PART)
    assert found["pools"]["prefill"] == {"idle": 0.6, "full": 0.05, "running_per_engine": 0.5}
    assert found["pools"]["decode"] == {"idle": 0, "full": 0.9, "running_per_engine": 32}
    assert "decode          32.0 requests running on an engine, 90% of the time full, 0% idle" in text(found)


def test_a_part_from_before_pools_were_counted_is_read() -> None:
    fields = msgspec.to_builtins(PART)
    for name in ("pools", "course", "units_per_gpu_hour"):
        del fields[name]
    old = msgspec.json.decode(msgspec.json.encode(fields), type=Part)
    assert report(old)["pools"] == {}
    assert report(old)["advice"] is None


BUSY, IDLE, HALF = Use(100, 0, 95, 800.0), Use(100, 70, 0, 10.0), Use(100, 10, 20, 300.0)


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        (BUSY, IDLE, "prefill was the narrow place, and decode was idle 70% of the time"),
        (IDLE, BUSY, "decode was the narrow place, and prefill was idle 70% of the time"),
        (IDLE, HALF, "no pool was kept full"),
        (BUSY, BUSY, None),
        (HALF, BUSY, None),
        (Use(10, 10, 0, 0.0), BUSY, None),
    ],
)
def test_advice(prefill: Use, decode: Use, words: str | None) -> None:
    found = pools.advice({"prefill": prefill, "decode": decode})
    assert (found is None) if words is None else found is not None and words in found


def test_engines_are_sampled_one_by_one() -> None:
    found: dict[str, Use] = {}
    pools.look(found, [EngineLoad("decode", 4, 0), EngineLoad("decode", 0, 0), EngineLoad("prefill", 0, 2)])
    assert found == {"decode": Use(2, 1, 0, 4.0), "prefill": Use(1, 0, 1, 0.0)}


def test_a_long_course_has_few_points_that_are_evenly_spaced() -> None:
    course = Course(0.0)
    for second in range(1, 10_000):
        course.note(float(second), second, 2 * second)
    assert MOST_POINTS / 2 <= len(course.points) <= MOST_POINTS
    gaps = {after.at - before.at for before, after in zip(course.points, course.points[1:], strict=False)}
    assert gaps == {64.0}
    assert all(point.rows == point.at for point in course.points)


def test_the_picture_has_each_job_and_each_band() -> None:
    later = msgspec.structs.replace(PART, member="8.0-<&>", job_began=6 * HOUR, began=6 * HOUR, course=[])
    drawn = ElementTree.fromstring(plot.svg([PART, later]))
    lines = [element for element in drawn if element.tag.endswith("polyline")]
    assert [line[0].text for line in lines] == ["7.0-head-1-1", "8.0-<&>"]
    first = [tuple(map(float, pair.split(","))) for pair in lines[0].attrib["points"].split()]
    # Rates are those of the first two hours and the next three: 250 and 203.7 tokens/s; up is less.
    assert len(first) == 2 and first[0][0] < first[1][0] and first[0][1] < first[1][1]
    colours = [element.attrib.get("fill") for element in drawn if element.tag.endswith("rect")]
    assert all(colours.count(colour) >= 2 for colour in plot._COLOURS.values())
