"""The way from `sbatch` to READY, as a pure fold over what can be seen from the login node.

Events, the scheduler's answer and the files of the ranks go in; rungs come out. Times are unix
seconds, durations seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..plan.plan import Plan
from ..plan.preflight import has_preflight
from ..slurm.scheduler import JobState

RungState = Literal["ahead", "now", "done", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    state: Literal["ahead", "starting", "loading", "ready", "died"] = "ahead"
    text: str = ""
    seconds: float | None = None
    at: float | None = None
    """When it got into this state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """All that is known about a launch."""

    submitted: float
    ranks: int
    """How many the job has."""
    replicas: Mapping[str, Replica]
    disaggregated: bool
    stages: bool = False
    """The model is copied to the nodes first."""
    job: JobState | None = None
    started: float | None = None
    """When the job script began."""
    joined: Mapping[int, str] = field(default_factory=dict)
    """Rank -> node."""
    last_joined: float | None = None
    roster: Mapping[str, Any] | None = None
    staging: Mapping[str, Any] | None = None
    staged: Mapping[str, Any] | None = None
    preflight: Mapping[str, Any] | None = None
    has_preflight: bool = False
    """Links are measured before engines start."""
    kv: tuple[Mapping[str, Any], ...] = ()
    first_token: Mapping[str, Any] | None = None
    ready: Mapping[str, Any] | None = None
    failed: Mapping[str, Any] | None = None
    stopped: str | None = None
    draining: str | None = None
    warnings: tuple[tuple[str, str | None], ...] = ()

    @property
    def finished(self) -> bool:
        """Waiting longer changes nothing."""
        ended = self.job is not None and self.job.over
        return ended or not (self.ready is None and self.failed is None and self.stopped is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    name: str
    state: RungState
    text: str = ""
    at: float | None = None
    """When it was reached."""


def begin(plan: Plan, submitted: float) -> Progress:
    return Progress(
        submitted=submitted,
        ranks=plan.nodes,
        replicas={replica.name: Replica() for replica in plan.replicas},
        disaggregated=plan.disaggregated,
        stages=bool(plan.model.stage),
        has_preflight=has_preflight(plan),
    )


def fold(progress: Progress, events: Iterable[Mapping[str, Any]]) -> Progress:
    for event in events:
        progress = _step(progress, event)
    return progress


def with_joined(progress: Progress, joined: Mapping[int, str], now: float) -> Progress:
    """`joined` comes from ranks/, which is ahead of the event log and outlives a dead head node."""
    new = {**joined, **progress.joined}
    if len(new) == len(progress.joined):
        return progress
    return replace(progress, joined=new, last_joined=now)


def _step(progress: Progress, event: Mapping[str, Any]) -> Progress:
    when = float(event["t"])
    match event["event"]:
        case "job-started":
            return _attempt(progress, when)
        case "rank-joined":
            joined = {**progress.joined, int(event["rank"]): str(event["node"])}
            return replace(progress, joined=joined, last_joined=when)
        case "rendezvous":
            return replace(progress, roster=event)
        case "preflight":
            return replace(progress, preflight=event)
        case "staging":
            return replace(progress, staging=event)
        case "staged":
            return replace(progress, staged=event)
        case "warning":
            warning = (str(event["message"]), event.get("hint"))
            return replace(progress, warnings=(*progress.warnings, warning))
        case "engine-starting":
            return _replica(progress, event, Replica(state="starting", text="starting"))
        case "engine-loading":
            return _replica(progress, event, Replica(state="loading", text=str(event["progress"])))
        case "engine-ready":
            ready = Replica(state="ready", seconds=event.get("seconds"), at=when)
            return _replica(progress, event, ready)
        case "engine-died":
            return _replica(progress, event, Replica(state="died", text=_death(event)))
        case "kv-path":
            return replace(progress, kv=(*progress.kv, event))
        case "first-token":
            return replace(progress, first_token=event)
        case "ready":
            return replace(progress, ready=event)
        case "failed":
            return replace(progress, failed=event)
        case "stopped":
            return replace(progress, stopped=str(event.get("reason") or "stopped"))
        case "draining":
            return replace(progress, draining=str(event.get("reason") or "draining"))
    return progress  # an event of a newer hpcserve, or one that is no rung


def _attempt(progress: Progress, when: float) -> Progress:
    """A job that Slurm put back in the queue begins anew; what its last attempt reached is gone."""
    if progress.started is None:
        return replace(progress, started=when)
    return Progress(
        submitted=progress.submitted,
        ranks=progress.ranks,
        replicas=dict.fromkeys(progress.replicas, Replica()),
        disaggregated=progress.disaggregated,
        stages=progress.stages,
        has_preflight=progress.has_preflight,
        job=progress.job,
        started=when,
        warnings=progress.warnings,
    )


def _replica(progress: Progress, event: Mapping[str, Any], replica: Replica) -> Progress:
    return replace(progress, replicas={**progress.replicas, str(event["replica"]): replica})


def _death(event: Mapping[str, Any]) -> str:
    after = event.get("restart_in")
    again = f", starts again in {after:.0f} s" if isinstance(after, int | float) else ""
    return f"died: {event.get('message') or event.get('cause') or 'unknown cause'}{again}"


def rungs(progress: Progress, now: float) -> tuple[Rung, ...]:
    """All rungs in order; the first that is not done is `now`, or `failed` when the job is over."""
    steps = [
        _queued(progress, now),
        _allocated(progress),
        _joined(progress),
        *([_links(progress)] if progress.has_preflight else []),
        *([_staged(progress)] if progress.stages else []),
        _loading(progress),
        *([_kv(progress)] if progress.disaggregated else []),
        _first_token(progress),
        _ready(progress),
    ]
    # A later rung implies the earlier ones, whatever got lost on the way (`squeue` was down, say).
    last = max((place for place, rung in enumerate(steps) if rung.state == "done"), default=-1)
    over = progress.failed is not None or (progress.finished and progress.ready is None)
    result = []
    for place, rung in enumerate(steps):
        state: RungState = "ahead"
        if place <= last:
            state = "done"
        elif place == last + 1:
            state = "failed" if over else "now"
        result.append(replace(rung, state=state, text=rung.text if state != "ahead" else ""))
    return tuple(result)


def _queued(progress: Progress, now: float) -> Rung:
    job = progress.job
    begun = progress.started or (job.start if job and job.phase in ("starting", "running") else None)
    if begun is not None or (job is not None and job.phase in ("starting", "running")):
        return Rung(name="queued", state="done", at=begun or now)
    if job is None:
        return Rung(name="queued", state="now", text="asking the scheduler")
    text = job.words
    if job.phase == "queued" and job.start is not None and job.start > now:
        text += f"; expected to start in {duration(job.start - now)}"
    return Rung(name="queued", state="now", text=text)


def _allocated(progress: Progress) -> Rung:
    job = progress.job
    nodes = job.nodes if job else ()
    named = f"{' '.join(nodes[:8])}{' …' if len(nodes) > 8 else ''}"
    if progress.started is not None:
        return Rung(name="nodes allocated", state="done", text=named, at=progress.started)
    if job is not None and job.phase == "running":
        return Rung(name="nodes allocated", state="done", text=named, at=job.start)
    return Rung(name="nodes allocated", state="now", text=job.words if job else "")


def _joined(progress: Progress) -> Rung:
    count = f"{len(progress.joined)}/{progress.ranks}"
    if progress.roster is not None:
        text = f"{progress.ranks}/{progress.ranks} over {progress.roster.get('transport', '?')}"
        return Rung(name="ranks joined", state="done", text=text, at=float(progress.roster["t"]))
    missing = _missing(progress)
    return Rung(name="ranks joined", state="now", text=f"{count}{missing}")


def _missing(progress: Progress) -> str:
    absent = [rank for rank in range(progress.ranks) if rank not in progress.joined]
    if not absent or not progress.joined:
        return ""
    nodes = progress.job.nodes if progress.job else ()
    silent = [node for node in nodes if node not in progress.joined.values()]
    # Slurm's node names and the hosts' own may differ: then only the ranks are certain.
    certain = len(nodes) == progress.ranks and len(silent) == len(absent)
    named = silent if certain else [f"rank {rank}" for rank in absent]
    return f", missing {', '.join(named[:6])}{' …' if len(named) > 6 else ''}"


def _links(progress: Progress) -> Rung:
    event = progress.preflight
    if event is None:
        return Rung(name="links measured", state="now")
    pairs, failed, slowest = int(event.get("pairs") or 0), event.get("failed"), event.get("slowest")
    text = f"{pairs} pair{'s' if pairs != 1 else ''}"
    if failed:
        text += f", {failed} failed"
    if event.get("unmeasured"):
        text += f", {event['unmeasured']} not measured"
    if event.get("over_nvlink"):
        text += f", {event['over_nvlink']} over NVLink, which is not measured"
    if slowest:
        text += f", slowest {slowest['prefill']} → {slowest['decode']} {float(slowest['gbs']):.3g} GB/s"
        if slowest.get("ratio") is not None:
            text += f" ({float(slowest['ratio']):.0%} of the link)"
    return Rung(name="links measured", state="done", text=text, at=float(event["t"]))


def _staged(progress: Progress) -> Rung:
    over, seen = progress.staged, progress.staging
    if over is not None:
        when = float(over["t"])
        if over.get("path") is None:
            return Rung(
                name="model staged", state="done", text="no: engines load from the shared path", at=when
            )
        text = f"{size(over['bytes'])} on {over['nodes']} nodes"
        text += f", {over['reused']} of them had it" if over.get("reused") else ""
        return Rung(name="model staged", state="done", text=f"{text}, {duration(over['seconds'])}", at=when)
    if seen is None:
        return Rung(name="model staged", state="now", text="staging")
    text = f"staging {size(seen['bytes'])} of {size(seen['total'])}, {size(seen['rate'])}/s"
    return Rung(name="model staged", state="now", text=text)


def _loading(progress: Progress) -> Rung:
    states = progress.replicas.items()
    ready = [name for name, replica in states if replica.state == "ready"]
    if progress.replicas and len(ready) == len(progress.replicas):
        slowest = max((replica.seconds or 0.0 for _, replica in states), default=0.0)
        text = f"{len(ready)}/{len(ready)} ready, the slowest after {duration(slowest)}"
        moment = max((replica.at or 0.0 for _, replica in states), default=None)
        return Rung(name="engines loading", state="done", text=text, at=moment)
    busy = [f"{name} {replica.text}" for name, replica in states if replica.text]
    text = "; ".join([f"{len(ready)}/{len(progress.replicas)} ready", *busy[:4]])
    return Rung(name="engines loading", state="now", text=text + (" …" if len(busy) > 4 else ""))


def _kv(progress: Progress) -> Rung:
    good = [event for event in progress.kv if event.get("ok")]
    bad = [event for event in progress.kv if not event.get("ok")]
    if progress.first_token is not None or progress.ready is not None or (good and not bad):
        total = sum(float(event.get("bytes") or 0) for event in good)
        text = f"{size(total)} moved by {len(good)} real answer{'s' if len(good) != 1 else ''}"
        return Rung(name="KV path proven", state="done", text=text, at=_last(good))
    pairs = ", ".join(f"{event.get('prefill')} → {event.get('decode')}" for event in bad)
    return Rung(name="KV path proven", state="now", text=f"no KV bytes moved: {pairs}" if bad else "")


def _last(events: list[Mapping[str, Any]]) -> float | None:
    return max((float(event["t"]) for event in events), default=None)


def _first_token(progress: Progress) -> Rung:
    event = progress.first_token
    if event is None:
        return Rung(name="first token", state="now")
    seconds = event.get("seconds")
    text = f"after {seconds:.2f} s through the router" if isinstance(seconds, int | float) else ""
    return Rung(name="first token", state="done", text=text, at=float(event["t"]))


def _ready(progress: Progress) -> Rung:
    if progress.ready is None:
        return Rung(name="READY", state="now")
    url = str(progress.ready.get("url") or "")
    return Rung(name="READY", state="done", text=url, at=float(progress.ready["t"]))


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05`, `1:02:03`, `2-03:00:00`: Slurm's own way from a minute on."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{left:02}"
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
