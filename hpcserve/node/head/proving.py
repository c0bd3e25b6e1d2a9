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

    async def _pairs(self, unproven: dict[str, Replica]) -> list[JobError]:
        targets = [(self._target(replica), replica.plan.role) for replica in self._registry.ready()]
        # Proven partners first: a failure then says something about the new one.
        targets.sort(key=lambda entry: entry[0].name in unproven)
        prefills = [target for target, role in targets if role == "prefill"]
        decodes = [target for target, role in targets if role == "decode"]
        if not prefills:
            return await self._without_prefill(unproven)
        good: set[str] = set()
        errors = await self._try(pairs_to_prove(prefills, decodes, set(unproven)), good)
        # A replica must not stay out because its partner is the broken one.
        again = []
        for target, role in targets:
            if target.name in errors and target.name not in good:
                others = (other for other, its in targets if its != role)
                partners = [other for other in others if _trusted(other, unproven, good)]
                if partners:
                    again.append((target, partners[0]) if role == "prefill" else (partners[0], target))
        errors |= await self._try(again, good)
        broken = [target for target, _ in targets if target.name in unproven and target.name in errors]
        for target in broken:
            if target.name not in good:
                self._keep_out(target, errors[target.name])
        return [errors[target.name] for target in broken if target.name not in good]

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
            replica.name == target.name and replica.generation == target.generation
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
        target = self._target(replica)
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
        # It may have been restarted meanwhile: then the proof is about an engine that is gone.
        self._tell(self._registry.prove(target.name, target.generation))

    def _keep_out(self, target: Target, error: JobError) -> None:
        retry_at = asyncio.get_running_loop().time() + RETRY
        news = self._registry.keep_out(target.name, error.message, retry_at)
        warning = {"message": f"{target.name} is kept out of rotation: {error.message}", "hint": error.hint}
        self._tell([("warning", warning), *news])

    def _target(self, replica: Replica) -> Target:
        entry = replica.entry
        assert entry is not None and entry.url is not None, "only replicas that are ready come here"
        return Target(
            name=replica.name,
            url=entry.url,
            generation=entry.generation,
            ports=entry.ports,
            machine=self._machine(replica.rank),
        )

    def _machine(self, rank: int) -> str:
        # The rank decides, not the machine id: two ranks talk over the network also on one machine.
        return f"{self._roster.ranks[rank].node} {rank}"


def _trusted(target: Target, unproven: dict[str, Replica], good: set[str]) -> bool:
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
