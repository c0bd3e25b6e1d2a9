"""What sending a request to a worker costs, in seconds. Pure functions; every constant is here.

    cost = wait                 prompts ahead of it, less what has been done of the first of them
         + prefill + behind     computing what isn't cached, and what that costs others
         - copy                 less for a beginning that many prompts share: the next ones find it there
         + disturbance          the same seconds once more, for each stream that a prefill holds up there
         + stall                what its own answer will suffer from prefills that come later
         + decode + barrier     streams that share each step, and KV memory near its end
         + loading + transfer   KV blocks from slower memory, or from the prefill worker

An aggregated worker stops its streams while it prefills. So `disturbance` keeps long prompts off workers with
many streams; and because it does, a new stream suffers less there: `stall` is the share of time the
pool spends on prefill, times what `disturbance` leaves of it on this worker. The two together part a pool
into workers that mostly prefill and workers that mostly write, as far as the load allows.
"""

from __future__ import annotations

from .facts import Rates

BEHIND = 7.0
"""A second of prefill delays those behind it as well, and costs cached blocks their place: that weighs as
utilization over idleness, as queues grow. An idle pool has nobody behind, and a copy more costs little."""
BUSIEST = 0.9
"""Utilization beyond which these weights don't grow."""
PER_STREAM = 0.3
"""Seconds that a second of prefill costs for each stream it stops."""
STEP_PER_STREAM = 0.000_05
"""Seconds by which one more stream lengthens each step of a batch."""
BARRIER = 0.15
"""Seconds at half-full KV memory; grows as used/free."""
FULLEST = 0.99
PROGRESS = 0.95
"""Of a prefill rate, while streams are served beside it."""
HOST_BYTES_PER_S = 20e9
DISK_BYTES_PER_S = 2e9
"""KV blocks read back from the host's memory and from disk: PCIe 4, and one good NVMe drive."""
FAR = 4.0
"""How much slower KV moves between two NVLink domains or leaf switches than inside one."""
TWO_LEGS = 0.005
"""Seconds for the second request of a pair."""
SESSION = 0.5
"""Part of the prefill that a session's own worker is trusted to spare where no cache is known."""


def wait(queued_tokens: float, head_tokens: float, head_seconds: float, rate: float) -> float:
    """Seconds of prefill ahead. `head_seconds` ago the first of them, of `head_tokens`, was begun."""
    done = head_seconds * PROGRESS * rate
    most = 0.9 * head_tokens
    if most > queued_tokens:
        most = queued_tokens
    if done > most:
        done = most
    return (queued_tokens - done if done > 0.0 else queued_tokens) / rate


def behind(prefilling: float) -> float:
    """What a second of prefill counts but for streams. `prefilling`: share of time the pool's workers do."""
    share = prefilling if prefilling < BUSIEST else BUSIEST
    return 1.0 + BEHIND * share / (1.0 - share)


def copied(uses: float) -> float:
    """How much of what a copy of cached tokens costs others it gives back, 0 to 1: the next ones share it."""
    return uses / (1.0 + uses)


def prefill_factor(behind: float, streams: float) -> float:
    """What a second of prefill counts on a worker with so many streams."""
    return behind + PER_STREAM * streams


def stall_factor(prefilling: float, behind: float) -> float:
    """Seconds that prefills stop an answer, for each second it takes by itself, times `prefill_factor`.

    Divided by the worker's own factor, as prefills go elsewhere by that measure.
    """
    share = prefilling if prefilling < BUSIEST else BUSIEST
    return share / (1.0 - share) * behind


def barrier(usage: float) -> float:
    """Seconds to fear where KV memory is used up: requests wait, or are preempted and computed again."""
    used = min(max(usage, 0.0), FULLEST)
    return BARRIER * used / (1.0 - used)


def decode(streams: float, output_tokens: float) -> float:
    return streams * output_tokens * STEP_PER_STREAM


def loading(host_tokens: float, disk_tokens: float, rates: Rates) -> float:
    """Seconds to bring cached blocks back to the GPU."""
    return rates.kv_bytes_per_token * (host_tokens / HOST_BYTES_PER_S + disk_tokens / DISK_BYTES_PER_S)


def transfer(tokens: float, rates: Rates) -> float:
    """Seconds to pull the KV of `tokens` inside a domain; `rates` are those of the worker that pulls."""
    return tokens * rates.kv_bytes_per_token / rates.transfer
