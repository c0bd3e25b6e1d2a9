"""What a site allows: checked before anything is placed."""

from __future__ import annotations

from collections.abc import Iterator

from ..config.model import ModelSpec
from ..config.site import ContainerSite, Site
from ..errors import PlanError
from .abilities import ABILITIES
from .explain import duration


def check_site(site: Site) -> None:
    runtime = site.container.runtime
    if runtime != "none" and not site.container.image:
        raise PlanError(
            f"site {site.name} runs programs in {runtime}, but container.image is not set",
            hint="add `container: {image: …}` to the site config, or set `runtime: none`",
        )
    if runtime != "none" and site.scheduler == "local":
        raise PlanError(
            f"site {site.name} has scheduler: local and container.runtime: {runtime}; "
            "local ranks are plain processes",
            hint="set `container: {runtime: none}` in the site config",
        )
    if runtime == "none" and site.container.agent == "outside":
        raise PlanError(
            f"site {site.name} has container.agent: outside, but no container",
            hint="set `runtime` and `image` of the container, or leave `agent` out",
        )
    if runtime != "none":
        _check_container(site.name, site.container)
    if site.ports.low > site.ports.high:
        raise PlanError(
            f"site {site.name} has ports.low {site.ports.low} above ports.high {site.ports.high}",
            hint="swap the two in the site config",
        )
    if site.scheduler == "slurm" and site.slurm.account_required and not site.slurm.account:
        raise PlanError(
            f"site {site.name} takes no job without an account",
            hint="add `--account NAME`, or `slurm: {account: NAME}` to your copy of the site config",
        )


_HIDING = frozenset({"--cleanenv", "-e", "--containall", "-C", "--compat"})
"""Flags of Apptainer that keep the job's environment outside; --compat is --containall and more."""
_WITH_VALUE = "BHSWo"
"""Short flags after which the rest of a word is their value."""
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
"""What Apptainer takes for no (Go's ParseBool)."""


def _check_container(name: str, container: ContainerSite) -> None:
    if container.runtime == "pyxis" and container.agent == "outside":
        raise PlanError(
            f"site {name} has container.agent: outside, and pyxis puts whole steps of a job into a container",
            hint="use an image that has hpcserve too, with `agent: inside`, or `runtime: apptainer`",
        )
    hiding = [flag for word in container.args for flag in switched_on(word) if flag in _HIDING]
    if container.runtime == "apptainer" and hiding:
        raise PlanError(
            f"site {name} has {hiding[0]} in container.args: programs inside would not know their rank, "
            "GPUs and network",
            hint="leave it out: Python's and the loader's variables of the node are kept outside anyway",
        )


def switched_on(word: str) -> Iterator[str]:
    """Flags that a word of Apptainer's command line switches on: `-Ce` is two."""
    if word.startswith("--"):
        name, _, value = word.partition("=")
        if value not in _FALSE:
            yield name
    elif word.startswith("-"):
        letters, _, value = word[1:].partition("=")
        for number, letter in enumerate(letters, 1):
            if letter in _WITH_VALUE:
                return
            if number < len(letters) or value not in _FALSE:
                yield f"-{letter}"


def check_nodes(site: Site, nodes: int, where: str) -> None:
    most = site.slurm.max_nodes
    if site.scheduler == "slurm" and most is not None and nodes > most:
        raise PlanError(
            f"{where} asks for {nodes} nodes, but a job at site {site.name} may have at most {most}",
            hint=f"use `--nodes {most}` or fewer",
        )


def check_walltime(site: Site, model: ModelSpec, walltime: int, where: str) -> None:
    longest = site.slurm.max_walltime
    if site.scheduler == "slurm" and longest is not None and walltime > longest:
        raise PlanError(
            f"{where} is {duration(walltime)}, but a job at site {site.name} may run "
            f"at most {duration(longest)}",
            hint=f"use `--walltime {duration(longest)}` or less",
        )
    if model.drain >= walltime:
        raise PlanError(
            f"drain is {model.drain} s, but the walltime is only {walltime} s: "
            "the endpoint would refuse every request",
            hint="lower `drain` in model.yaml, or raise `--walltime`",
        )


def check_step(site: Site, engine: str, role: str, span: int, *, alike: bool) -> None:
    """A replica over `span` nodes that is one MPI program is started by srun, from an agent.

    `alike`: all nodes of the job are of one type.
    """
    able = ABILITIES[engine]
    if span == 1 or not able.by_step:
        return
    what = f"{role}: a replica of {able.title} over {span} nodes is an MPI program that srun starts"
    smaller = f"lower the parallel sizes of `{role}` so that a replica fits on one node"
    if site.scheduler == "local":
        raise PlanError(f"{what}, and site {site.name} has no Slurm", hint=smaller)
    if site.container.runtime != "none":
        raise PlanError(
            f"{what} from its first node, but inside {site.container.runtime} there are no Slurm commands",
            hint=f"{smaller}, or use a site config with `container: {{runtime: none}}` whose `setup` makes "
            f"{able.title} available",
        )
    if not alike:
        raise PlanError(
            f"{what}, but in a heterogeneous job hpcserve starts no such steps",
            hint=f"{smaller}, or use one `node_type` for both pools",
        )
    if site.slurm.mpi == "none":
        raise PlanError(
            f"{what}, but slurm.mpi of site {site.name} is none",
            hint="set `slurm: {mpi: pmix}`, or what else `srun --mpi=list` names and its MPI knows; or "
            f"{smaller}",
        )


SLINGSHOT_NEEDS = (
    "use an `aggregated:` pool in model.yaml; for prefill and decode NIXL would need its LIBFABRIC plugin "
    "in place of UCX, the site's own libfabric with the cxi provider (1.21 or newer), and "
    "`--network=job_vni` in `slurm.extra` of the site, which hpcserve does not set up"
)
"""For people whose KV blocks would have to cross Slingshot."""


def check_kv_path(site: Site, engine: str, nodes: int) -> None:
    """Prefill and decode on different nodes need a fabric that the engine's transfers can use."""
    if nodes > 1 and ABILITIES[engine].nixl and site.network.kind == "slingshot":
        raise PlanError(
            f"site {site.name} has a Slingshot network, and NIXL's UCX can't use it: "
            "KV blocks would not reach the decode nodes",
            hint=SLINGSHOT_NEEDS,
        )
