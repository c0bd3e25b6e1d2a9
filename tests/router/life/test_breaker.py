"""When a worker that failed is asked again."""

from __future__ import annotations

from hpcserve.router.breaker import PROBATION, Breaker


def test_pauses_double_and_one_request_decides() -> None:
    breaker = Breaker()
    assert breaker.state(0.0) == "closed" and breaker.avoid_until == 0.0
    breaker.failed(10.0)
    assert breaker.state(11.9) == "open"
    # One death fails all requests of a worker.
    breaker.failed(10.1)
    assert breaker.avoid_until == 12.0
    breaker.asked(12.5)
    assert breaker.state(12.5) == "half-open"
    # Others are not sent while the probe is out.
    assert breaker.avoid_until > 12.5
    breaker.failed(13.0)
    assert breaker.avoid_until == 17.0
    for _ in range(10):
        breaker.asked(breaker.avoid_until)
        breaker.failed(breaker.avoid_until)
    before = breaker.avoid_until
    breaker.asked(before)
    breaker.failed(before)
    assert breaker.avoid_until == before + 30.0
    breaker.asked(before + 30.0)
    breaker.succeeded()
    assert breaker.state(before + 30.0) == "closed"
    breaker.failed(0.0)
    assert breaker.avoid_until == 2.0


def test_restarted_prefill_worker_is_on_probation_until_its_blocks_were_pulled() -> None:
    breaker = Breaker()
    breaker.probation(100.0)
    assert breaker.avoid_until == 100.0 + PROBATION
    breaker.asked(100.0 + PROBATION)
    breaker.succeeded()
    assert breaker.state(100.0 + PROBATION) == "half-open"
    breaker.handed_over()
    assert breaker.state(100.0 + PROBATION) == "closed"
