"""Every shipped site × nodes × layout × container runtime gives a script that bash and shellcheck like."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpcserve.config.model import ModelSpec, RoleSpec
from hpcserve.config.site import NodeSite, Site, SlurmSite
from hpcserve.errors import PlanError
from hpcserve.plan.plan import Plan
from hpcserve.render.engine import render_commands
from hpcserve.render.script import render_script

from .cases import IMAGES, PYTHON, SHIPPED, aggregated, contained, dgx, local, mixed, pair, plan, shipped

NODES = (1, 2, 8, 18)
LITERAL = ("--severity=style", "--exclude=SC2016")
"""SC2016 suspects every `$` in single quotes; the values of these tests are meant to stay as they are."""
MODELS = {"aggregated": aggregated(), "pair": pair()}


def matrix() -> Iterator[tuple[str, Plan]]:
    """All that can be planned, by a name for its file."""
    for name, runtime, nodes, (layout, model) in itertools.product(SHIPPED, IMAGES, NODES, MODELS.items()):
        try:
            yield (
                f"{name}-{nodes}-{layout}-{runtime}",
                plan(contained(shipped(name), runtime), model=model, nodes=nodes),
            )
        except PlanError as error:
            assert _expected(shipped(name), runtime, nodes, layout), (
                f"{name} {nodes} {layout} {runtime}: {error}"
            )

    for runtime in IMAGES:
        yield f"heterogeneous-{runtime}", mixed(runtime)


def _expected(site: Site, runtime: str, nodes: int, layout: str) -> bool:
    """Why a combination of the matrix can't be planned."""
    return (
        (site.scheduler == "local" and runtime != "none")
        or (site.slurm.max_nodes or nodes) < nodes
        or (layout == "pair" and nodes == 1 and max(site.node.gpus, site.node.cpu_engines) < 2)
        or (layout == "pair" and site.network.kind == "slingshot")
    )


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("scripts")
    run_dir = Path("/scratch/alice smith/it's 100%/$HOME `x`")
    for name, what in matrix():
        (directory / f"{name}.sh").write_text(render_script(what, run_dir, python=PYTHON))
    return sorted(directory.iterdir())


def test_every_shipped_site_is_in_the_matrix(scripts: list[Path]) -> None:
    for name in SHIPPED:
        found = [path.name for path in scripts if path.name.startswith(f"{name}-")]
        assert len(found) >= 4, name
    assert len(scripts) >= 60


def test_bash_reads_every_script(scripts: list[Path]) -> None:
    for path in scripts:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), path.name


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(scripts: list[Path]) -> None:
    distinct = {_logic(path.read_text()): path for path in scripts}
    paths = [str(path) for path in distinct.values()]
    done = subprocess.run(["shellcheck", *LITERAL, *paths], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def _logic(text: str) -> str:
    """A script without the values that only its header and its comments carry."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_accepts_the_engine_commands(tmp_path: Path) -> None:
    model = ModelSpec(
        model="/models/it's a llama",
        served_name="a",
        prefill=RoleSpec(tensor_parallel=16),
        decode=RoleSpec(),
        engine_args={"hf-overrides": {"x": '$HOME `y` "z"'}, "chat-template": "$(reboot)"},
        env={"A": "$HOME"},
    )
    paths = []
    for name, what in (
        ("wide", plan(dgx(), model=model, nodes=3)),
        ("local", plan(local(), model=pair(), nodes=2)),
    ):
        paths.append(tmp_path / f"{name}.sh")
        paths[-1].write_text("#!/bin/bash\n" + render_commands(what, python=PYTHON))
    # SC2154: the variables at the top are for the reader to set.
    done = subprocess.run(
        ["shellcheck", *LITERAL, "--exclude=SC2154", *paths], capture_output=True, text=True
    )
    assert done.stdout == ""


def directives(what: Plan) -> list[str]:
    text = render_script(what, Path("/runs/a"), python=PYTHON)
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_directives_are_sorted_and_spelled_with_an_equals_sign() -> None:
    found = directives(plan(dgx(account="proj", partition="gpu", memory="0", gpu_type="h100"), nodes=2))
    assert found == sorted(found)
    bare = {"--exclusive", "--no-kill", "--no-requeue"}
    assert all("=" in line for line in set(found) - bare)
    assert {"--gres=gpu:h100:8", "--mem=0", "--account=proj", "--partition=gpu", "--nodes=2"} <= set(found)


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ({}, {"--gres=gpu:8", "--exclusive", "--no-requeue"}),
        ({"gpu_request": "gpus-per-node", "gpu_type": "h100"}, {"--gpus-per-node=h100:8"}),
        ({"requeue": True, "qos": "high"}, {"--requeue", "--qos=high"}),
        ({"constraint": "gpu&hbm80g"}, {"--constraint=gpu&hbm80g"}),
        ({"constraint": "a b"}, {'"--constraint=a b"'}),
        ({"exclusive": False, "cpus_per_task": 16}, {"--cpus-per-task=16", "--gres=gpu:8"}),
        ({"extra": ("--comment=x",)}, {"--comment=x"}),
    ],
)
def test_site_settings_become_directives(slurm: dict[str, object], expected: set[str]) -> None:
    assert expected <= set(directives(plan(dgx(**slurm))))


def test_gpus_are_not_asked_for_where_the_site_says_so() -> None:
    assert not [line for line in directives(plan(dgx(gpu_request="none"))) if "gpu" in line]


def test_shared_nodes_are_asked_for_the_gpus_that_are_used() -> None:
    model = ModelSpec(model="/m", aggregated=RoleSpec(tensor_parallel=2, replicas=1))
    found = directives(plan(dgx(exclusive=False), model=model))
    assert "--gres=gpu:2" in found
    assert "--exclusive" not in found


@pytest.mark.parametrize(
    ("walltime", "drain", "signal"), [(3600, 120, 180), (3600, 0, 60), (100, 90, 75), (400000, 100000, 65535)]
)
def test_the_signal_leaves_time_to_drain_and_to_end(walltime: int, drain: int, signal: int) -> None:
    model = aggregated(walltime=walltime, drain=drain)
    assert f"--signal=B:TERM@{signal}" in directives(plan(dgx(), model=model))


def test_percent_signs_of_the_run_directory_reach_sbatch_as_such() -> None:
    text = render_script(plan(dgx()), Path("/runs/100%j"), python=PYTHON)
    assert "#SBATCH --output=/runs/100%%j/logs/job.log" in text


def test_a_replica_over_nodes_stays_inside_one_segment() -> None:
    model = ModelSpec(model="/m", aggregated=RoleSpec(tensor_parallel=16))
    assert "--segment=2" in directives(plan(dgx(segment=True), model=model, nodes=4))
    assert not [line for line in directives(plan(dgx(segment=True), nodes=4)) if "segment" in line]


@pytest.mark.parametrize(
    ("nodes", "tensor", "segment"),
    [
        (4, 4, 4),  # KV blocks cross NVLink between any two of its nodes
        (16, 8, 16),
        (20, 4, None),  # larger than a rack, and no replica has several nodes
        (20, 8, 2),  # larger than a rack: a replica at least is inside one
        (40, 80, None),  # a replica that is itself larger
    ],
)
def test_a_job_that_fits_into_an_nvlink_domain_asks_for_one(
    nodes: int, tensor: int, segment: int | None
) -> None:
    site = Site(name="s", slurm=SlurmSite(segment=True), node=NodeSite(gpus=4, nvlink_domain_nodes=18))
    pools = {"prefill": RoleSpec(tensor_parallel=tensor), "decode": RoleSpec(tensor_parallel=tensor)}
    asked = directives(plan(site, model=ModelSpec(model="/m", **pools), nodes=nodes))
    found = [line for line in asked if line.startswith("--segment")]
    assert found == ([] if segment is None else [f"--segment={segment}"])


def test_a_segment_is_a_divisor_of_the_job_that_cuts_no_replica() -> None:
    def asked(prefill: int, decode: int, of: int, domain: int = 1, wide: int = 8) -> list[str]:
        site = dgx(segment=True)
        site = replace(site, node=replace(site.node, nvlink_domain_nodes=domain))
        model = ModelSpec(
            model="/m",
            prefill=RoleSpec(tensor_parallel=wide, nodes=prefill),
            decode=RoleSpec(tensor_parallel=8, data_parallel=of, nodes=decode),
        )
        return [line for line in directives(plan(site, model=model)) if "segment" in line]

    assert asked(4, 4, of=4) == ["--segment=4"]
    assert asked(2, 4, of=4) == ["--segment=6"]  # ranks 2 to 5: neither 2 nor 3 is wide enough
    assert asked(10, 8, of=8, domain=16) == ["--segment=9"]
    assert asked(10, 8, of=8, domain=16, wide=16) == []  # 9 would cut the replica on 8 and 9
    assert asked(10, 8, of=8, domain=8) == []  # no block is as large


def test_a_line_break_in_a_value_is_refused() -> None:
    from hpcserve.errors import ConfigError

    with pytest.raises(ConfigError, match="line break"):
        directives(plan(dgx(), partition="gpu\n#SBATCH --uid=0"))
