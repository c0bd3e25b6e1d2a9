"""Every engine's command line before any node is known: shell variables stand for what the job finds out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from .. import engines
from ..engines.base import Engine, EngineCommand, EngineContext
from ..plan.offload import shared_bytes
from ..plan.plan import Plan, ReplicaPlan
from .engine_step import srun_words
from .quoting import literal, quote
from .script import python_on_nodes

_VARIABLE = re.compile(
    r"\$(?:ADDRESS|HEAD_ADDRESS|MODEL|NODES|RUN_DIR|SCRATCH|START|PYTHON"
    r"|(?:HTTP|SIDE_CHANNEL|MASTER|DP_RPC|BOOTSTRAP|DIST|NCCL)_PORT)\b"
)

_END = "END_OF_FILE"
_STEP_NOTE = "# In the job, each task of a step gets the variables of its own node."

Placed = tuple[ReplicaPlan, int, EngineCommand]
"""A replica, one of its nodes (the rank), and the process there."""


def engine_commands(plan: Plan, *, python: str | None = None) -> list[Placed]:
    """Each engine process with `$ADDRESS`, `$HTTP_PORT`, … in the place of what nodes decide.

    Raises ConfigError when `engine_args` or `env` sets what hpcserve sets, so a launch that renders
    these first fails before sbatch.
    """
    engine = engines.of(plan.model)
    program = "$PYTHON" if python is None else python
    return [
        (replica, rank, engine.command(_context(plan, replica, place, engine, program)))
        for replica in plan.replicas
        for place, rank in enumerate(replica.nodes)
        # All its further processes belong to the step that its head starts.
        if place == 0 or not engine.in_step(replica)
    ]


def _context(plan: Plan, replica: ReplicaPlan, place: int, engine: Engine, python: str) -> EngineContext:
    return EngineContext(
        plan=plan,
        replica=replica,
        node=place,
        address="$ADDRESS",
        head_address="$ADDRESS" if place == 0 else "$HEAD_ADDRESS",
        ports={name: f"${name.upper()}_PORT" for name in engine.ports(replica)},
        model_path="$MODEL" if plan.model.stage else plan.model.model,
        python=python,
        scratch="$SCRATCH",
        start="$START",
    )


def render_commands(plan: Plan, *, python: str | None = None) -> str:
    """A shell script to read, or to run by hand node by node after setting the variables at its top.

    Replicas of one role differ in their GPUs only, so a line is printed per process all the same:
    it is what runs.
    """
    placed = engine_commands(plan, python=None)
    engine = engines.of(plan.model)
    stepped = any(engine.in_step(replica) for replica in plan.replicas)
    interpreter = _interpreter(plan, python) if python is not None else "python"
    head = [
        "# Engines, one command per process. In the job, agents fill these variables in:",
        "#   ADDRESS       this node's address that the other nodes reach",
        "#   …_PORT        ports bound on this node",
        "#   SCRATCH       private directory on this node",
        *(["#   RUN_DIR       the run directory"] if shared_bytes(plan) else []),
        *(["#   START         names this start of a replica"] if plan.model.kv_offload else []),
        *(
            ["#   MODEL         the staged copy of the model on each node, from staged.json"]
            if plan.model.stage
            else []
        ),
        "#   transport variables (UCX_NET_DEVICES, …) found on the node are added",
        *_nvlink_lines(plan, engine),
        *(["#   NODES         Slurm's names of the replica's nodes", _STEP_NOTE] if stepped else []),
        f"#   {engine.key_variable}  the job key, from secrets/job-key",
        *_container_lines(plan),
        f"PYTHON={quote(interpreter)}",
        "",
    ]
    return "\n".join([*head, *_blocks(plan, engine, placed)])


def _nvlink_lines(plan: Plan, engine: Engine) -> list[str]:
    flag = engine.nvlink_flag
    if flag is None or plan.site.node.nvlink_domain_nodes == 1:
        return []
    return [f"#   {flag} is added where KV blocks cross NVLink to other nodes"]


def _container_lines(plan: Plan) -> list[str]:
    container = plan.site.container
    if container.runtime == "none":
        return []
    return [f"# In the job they run in the site's container ({container.runtime}, {container.image})."]


def _interpreter(plan: Plan, python: str) -> str:
    container = plan.site.container
    if container.runtime != "none" and container.agent == "outside":
        return container.python
    return python_on_nodes(plan, python)


def _blocks(plan: Plan, engine: Engine, placed: list[Placed]) -> Iterator[str]:
    for replica, rank, command in placed:
        gpus = ",".join(map(str, replica.gpus))
        stepped = engine.in_step(replica)
        where = f"nodes {', '.join(map(str, replica.nodes))}" if stepped else f"node {rank}"
        yield f"# {replica.name} on {where}, slots {gpus}"
        for file, text in command.files.items():
            yield f"cat > \"$SCRATCH/{file}\" <<'{_END}'\n{text.rstrip()}\n{_END}"
        yield "env \\"
        for name, value in sorted(command.env.items()):
            yield f"  {_word(f'{name}={value}')} \\"
        if stepped:
            yield f"  {_arguments(tuple(srun_words(plan, replica, '$NODES')))} \\"
            yield f"  {engine.mpi_launcher} \\"
        yield f"  {_arguments(command.argv)}"
        yield ""


def _arguments(argv: tuple[str, ...]) -> str:
    """A flag and its values on one line."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(_word(word))
    return " \\\n    ".join(" ".join(line) for line in lines if line)


def _word(word: str) -> str:
    """Quoted, but with the variables of `_context`, and no others, left to the shell."""
    if not _VARIABLE.search(word):
        return shlex.quote(word)
    done, out = 0, []
    for match in _VARIABLE.finditer(word):
        out += [literal(word[done : match.start()]), match.group()]
        done = match.end()
    return '"' + "".join([*out, literal(word[done:])]) + '"'
