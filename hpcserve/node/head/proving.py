"""Decides which replicas to try with real requests, and tells the registry how it went."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ...errors import JobError
from ...plan.plan import Plan
from ..discovery.facts import Roster
from .kv_proof import Proof, Prover, Target, pairs_to_prove
from .registry import News, Registry, Replica

RETRY = 30.0
"""Seconds after a failed proof before the next."""
TRIES = 3
"""Requests until a replica is called broken. NIXL gives up a first handshake after 5 s, as on a node that
is still busy loading, and the decode engine then computes the prompt itself: the next request may pass."""
_PAUSE = 1.0
"""Seconds between two tries."""
_LOOK = 0.25
"""Seconds between two looks whether the engines of a running try are still there."""

Pair = tuple[Target, Target]


class Proving:
    def __init__(
        self,
        *,
        plan: Plan,
        roster: Roster,
        registry: Registry,
        prover: Prover,
        tell: Callable[[Sequence[News]], None],
    ) -> None:
        self._plan = plan
        self._roster = roster
        self._registry = registry
        self._prover = prover
        self._tell = tell
        self._answered: dict[tuple[str, int], set[str]] = {}
        """By start of a replica, which of its ranks have answered."""

    async def round(self) -> list[JobError]:
        """Try what is ready and unproven; returns the errors of the replicas that failed all tries.

        A replica that went away meanwhile is no error here: it is tried again when it comes back.
        """
        now = asyncio.get_running_loop().time()
        unproven = {replica.name: replica for replica in self._registry.unproven(now)}
        if not unproven:
            return []
        if self._plan.disaggregated:
            return await self._pairs(unproven)
        errors = await asyncio.gather(*(self._alone(replica) for replica in unproven.values()))
        return [error for error in errors if error is not None]

    async def _pairs(self, replicas: dict[str, Replica]) -> list[JobError]:
        targets = [
            (target, replica.plan.role)
            for replica in self._registry.ready()
            for target in self._targets(replica)
        ]
        # Proven partners first: a failure then says something about the new one.
        targets.sort(key=lambda entry: entry[0].replica in replicas)
        unproven = {target.name for target, _ in targets if target.replica in replicas}
        prefills = [target for target, role in targets if role == "prefill"]
        decodes = [target for target, role in targets if role == "decode"]
        if not prefills:
            return await self._without_prefill(replicas)
        good: set[str] = set()
        errors = await self._try(pairs_to_prove(prefills, decodes, unproven), good)
        # A replica must not stay out because its partner is the broken one.
        again = []
        for target, role in targets:
            if target.name in errors and target.name not in good:
                others = (other for other, its in targets if its != role)
                partners = [other for other in others if _trusted(other, unproven, good)]
                if partners:
                    again.append((target, partners[0]) if role == "prefill" else (partners[0], target))
        errors |= await self._try(again, good)
        # A replica is as good as its worst rank.
        broken = {
            target.replica: target
            for target, _ in targets
            if target.name in unproven and target.name in errors and target.name not in good
        }
        for target in broken.values():
            self._keep_out(target, errors[target.name])
        return [errors[target.name] for target in broken.values()]

    async def _try(self, pairs: Sequence[Pair], good: set[str]) -> dict[str, JobError]:
        """Prove the pairs; adds the names of those that work to `good`, returns the others' errors."""
        results = await asyncio.gather(*(self._pair(pair) for pair in pairs))
        errors: dict[str, JobError] = {}
        for pair, error in zip(pairs, results, strict=True):
            for target in pair:
                if error is not None:
                    errors[target.name] = error
                elif self._there(target):
                    good.add(target.name)
        return errors

    async def _pair(self, pair: Pair) -> JobError | None:
        """Up to TRIES requests; None when one passed, or when one of the two went away."""
        prefill, decode = pair
        for left in reversed(range(TRIES)):
            proof = await self._while_there(pair, self._prover.pair(prefill, decode))
            if proof is None:
                reason = f"{self._gone(pair)} went away during the test"
                self._tell([_kv_path(pair, seconds=0.0, error=reason)])
                return None
            error = proof.error
            told = error.message if error is not None else None
            self._tell([_kv_path(pair, seconds=proof.seconds, moved=proof.bytes, error=told)])
            if error is None:
                self._passed(pair, proof)
                return None
            if not left:
                return error
            self._tell([("warning", {
                "message": f"{error.message}; it is tried again",
                "hint": error.hint,
            })])  # fmt: skip
        raise AssertionError("unreachable")

    def _passed(self, pair: Pair, proof: Proof) -> None:
        if proof.bytes is None:
            self._tell([("warning", {
                "message": f"{pair[1].name} does not count KV bytes, so nothing shows that they moved",
                "hint": "READY is weaker here: only the answer was checked",
            })])  # fmt: skip
        for target in pair:
            self._prove(target)

    async def _while_there(self, targets: Sequence[Target], trying: Awaitable[Proof]) -> Proof | None:
        """The proof; None as soon as one of the engines is gone, however long a request to it would hang."""
        task = asyncio.ensure_future(trying)
        try:
            while all(self._there(target) for target in targets):
                done, _ = await asyncio.wait({task}, timeout=_LOOK)
                if done:
                    # A pause before the next try; and an engine that just died makes its request fail
                    # before its agent says so.
                    proof = task.result()
                    if proof.error is not None:
                        await asyncio.sleep(_PAUSE)
                    return proof if all(self._there(target) for target in targets) else None
            return None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _there(self, target: Target) -> bool:
        """Does this start of the replica still answer?"""
        return any(
            replica.name == target.replica and replica.generation == target.generation
            for replica in self._registry.ready()
        )

    def _gone(self, targets: Sequence[Target]) -> str:
        return " and ".join(target.name for target in targets if not self._there(target)) or "an engine"

    async def _without_prefill(self, unproven: dict[str, Replica]) -> list[JobError]:
        errors = []
        for replica in unproven.values():
            if replica.plan.role != "decode":
                continue
            error = await self._alone(replica)
            if error is not None:
                errors.append(error)
            elif replica.proven == replica.generation:
                self._tell([("warning", {
                    "message": f"no prefill replica is left: {replica.name} computes prompts itself",
                    "hint": "answers are right but slower; `hpcserve status` shows why prefill is away",
                })])  # fmt: skip
        return errors

    async def _alone(self, replica: Replica) -> JobError | None:
        for target in self._targets(replica):
            error = await self._alone_at(target)
            if error is not None:
                return error
        return None

    async def _alone_at(self, target: Target) -> JobError | None:
        for left in reversed(range(TRIES)):
            proof = await self._while_there([target], self._prover.alone(target))
            if proof is None:
                return None
            if proof.error is None:
                self._prove(target)
                return None
            if not left:
                self._keep_out(target, proof.error)
                return proof.error
        raise AssertionError("unreachable")

    def _prove(self, target: Target) -> None:
        """A rank answered; with the last one, its replica is proven."""
        start = target.replica, target.generation
        answered = self._answered.setdefault(start, set())
        answered.add(target.name)
        # It may have been restarted meanwhile: then the proof is about an engine that is gone.
        if not self._there(target):
            return
        replica = self._registry.replicas[target.replica]
        if answered >= {each.name for each in self._targets(replica)}:
            del self._answered[start]
            self._tell(self._registry.prove(*start))

    def _keep_out(self, target: Target, error: JobError) -> None:
        self._answered.pop((target.replica, target.generation), None)
        retry_at = asyncio.get_running_loop().time() + RETRY
        news = self._registry.keep_out(target.replica, error.message, retry_at)
        warning = {"message": f"{target.name} is kept out of rotation: {error.message}", "hint": error.hint}
        self._tell([("warning", warning), *news])

    def _targets(self, replica: Replica) -> tuple[Target, ...]:
        """What of a replica that is ready is to be tried: the replica, or each of its ranks."""
        return tuple(
            Target(
                name=worker.name,
                replica=worker.replica,
                url=worker.url,
                generation=worker.generation,
                ports=worker.ports,
                machine=self._machine(worker.node),
                rank=worker.rank,
                headers=worker.headers,
            )
            for worker in self._registry.workers_of(replica)
        )

    def _machine(self, rank: int) -> str:
        # The rank decides, not the machine id: two ranks talk over the network also on one machine.
        return f"{self._roster.ranks[rank].node} {rank}"


def _trusted(target: Target, unproven: set[str], good: set[str]) -> bool:
    return target.name in good or target.name not in unproven


def _kv_path(pair: Pair, *, seconds: float, moved: float | None = None, error: str | None = None) -> News:
    prefill, decode = pair
    return "kv-path", {
        "prefill": prefill.name,
        "decode": decode.name,
        "bytes": moved,
        "seconds": round(seconds, 3),
        "ok": error is None,
        "error": error,
    }
