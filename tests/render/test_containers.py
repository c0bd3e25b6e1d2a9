"""What a container sees of the node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcserve.config.model import KvOffloadSpec, ModelSpec
from hpcserve.config.site import ContainerSite, SetupSite, StorageSite
from hpcserve.errors import ConfigError, PlanError
from hpcserve.render.containers import apptainer_words, binds, pyxis_words
from hpcserve.render.quoting import words
from hpcserve.render.script import render_script

from .cases import RUN_DIR, dgx, local, plan

TOP = RUN_DIR.parents[1]
RUNS = f"{RUN_DIR.parent}:{RUN_DIR.parent}"


def planned(
    *own: str, model: str = "/models/llama", node_local: str = "/tmp", args: tuple[str, ...] = ()
) -> object:
    container = ContainerSite(runtime="apptainer", image="/i.sif", binds=own, args=args)
    site = replace(
        dgx(),
        container=container,
        storage=StorageSite(node_local=node_local),
        setup=SetupSite(env={"A": "1"}),
    )
    return plan(site, model=ModelSpec(model=model))


@pytest.mark.parametrize(
    ("own", "model", "expected"),
    [
        ((), "/models/llama", ["/tmp:/tmp", RUNS, "/models/llama:/models/llama:ro"]),
        (("/models:/models:ro",), "/models/llama", ["/tmp:/tmp", "/models:/models:ro", RUNS]),
        (("/scratch",), "org/llama", ["/tmp:/tmp", "/scratch"]),
        (("/mod:/mod",), "/models/llama", ["/tmp:/tmp", "/mod:/mod", RUNS, "/models/llama:/models/llama:ro"]),
        (("/models:/other",), "/models/x", ["/tmp:/tmp", "/models:/other", RUNS, "/models/x:/models/x:ro"]),
        (("/tmp",), "org/llama", ["/tmp", RUNS]),
        # What is shown read-only can't be written.
        (("/:/:ro",), "/models/llama", ["/:/:ro", "/tmp:/tmp", RUNS]),
        (("/tmp/x:/tmp/x:ro",), "org/llama", ["/tmp:/tmp", "/tmp/x:/tmp/x:ro", RUNS]),
        (
            ("/scratch", f"{TOP}:{TOP}:nosuid,ro"),
            "org/m",
            ["/tmp:/tmp", "/scratch", f"{TOP}:{TOP}:nosuid,ro", RUNS],
        ),
        (
            (f"{TOP}:{TOP}:ro", RUN_DIR.parent.as_posix()),
            "org/m",
            ["/tmp:/tmp", f"{TOP}:{TOP}:ro", RUN_DIR.parent.as_posix()],
        ),
        (
            ("~/data:~/data:ro", "/x:~/x"),
            "org/m",
            ["/tmp:/tmp", "$HOME/data:$HOME/data:ro", "/x:$HOME/x", RUNS],
        ),
        # The files of a snapshot are links to ../../blobs.
        (
            (),
            "/hub/models--org--llama/snapshots/0a1b",
            ["/tmp:/tmp", RUNS, "/hub/models--org--llama:/hub/models--org--llama:ro"],
        ),
    ],
)
def test_binds(own: tuple[str, ...], model: str, expected: list[str]) -> None:
    assert binds(planned(*own, model=model), RUN_DIR) == expected  # type: ignore[arg-type]


def test_a_directory_that_is_written_can_not_be_bound_read_only() -> None:
    with pytest.raises(ConfigError, match=r"/tmp:/tmp:ro, and hpcserve writes to that directory"):
        binds(planned("/tmp:/tmp:ro"), RUN_DIR)  # type: ignore[arg-type]


def test_a_filled_cache_of_the_hub_may_be_read_only() -> None:
    site = replace(
        dgx(),
        container=ContainerSite(runtime="apptainer", image="/i.sif", binds=("/hub:/hub:ro",)),
        setup=SetupSite(env={"HF_HOME": "/hub"}),
    )
    assert binds(plan(site, model=ModelSpec(model="org/llama")), RUN_DIR)[1:] == ["/hub:/hub:ro", RUNS]


def test_the_home_directory_in_binds_is_the_shells() -> None:
    text = words(apptainer_words(planned("~/data"), RUN_DIR))  # type: ignore[arg-type]
    assert '"--bind=$HOME/data"' in text


def test_node_local_storage_is_named_by_the_node() -> None:
    text = words(apptainer_words(planned(node_local="$SLURM_TMPDIR"), RUN_DIR))  # type: ignore[arg-type]
    assert '"--bind=$SLURM_TMPDIR:$SLURM_TMPDIR"' in text


def test_apptainer_flags_of_the_site_come_before_the_image() -> None:
    found = apptainer_words(planned(args=("--no-mount=cwd",)), RUN_DIR)  # type: ignore[arg-type]
    assert found[0] == "--nv"
    assert found[-2:] == ["--no-mount=cwd", "/i.sif"]


@pytest.mark.parametrize(
    "flag", ["--cleanenv", "-e", "--containall", "-C", "--compat", "-Ce", "-pe", "--cleanenv=true", "-pe=1"]
)
def test_flags_that_hide_the_jobs_environment_are_refused(flag: str) -> None:
    with pytest.raises(PlanError, match="would not know their rank"):
        planned(args=(flag,))


@pytest.mark.parametrize("flag", ["--cleanenv=false", "-B/data/Ce", "-p", "--env=A=-e", "-e=false", "-"])
def test_other_flags_are_not(flag: str) -> None:
    assert flag in apptainer_words(planned(args=(flag,)), RUN_DIR)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "own", "warned"),
    [
        (("--contain",), (), True),
        (("-pc",), ("/data",), True),
        (("--contain=false",), (), False),
        (("-c",), ("/dev/infiniband",), False),
        (("-c",), ("/dev",), False),
        ((), (), False),
    ],
)
def test_a_small_dev_is_told(args: tuple[str, ...], own: tuple[str, ...], warned: bool) -> None:
    script = render_script(planned(*own, args=args), RUN_DIR)  # type: ignore[arg-type]
    assert ("without InfiniBand" in script) == warned


def test_pyxis_can_not_contain_engines_alone() -> None:
    container = ContainerSite(runtime="pyxis", image="/i.sqsh", agent="outside")
    with pytest.raises(PlanError, match=r"container\.agent: outside"):
        plan(replace(dgx(), container=container))


def test_the_cache_of_the_hub_is_bound_where_the_site_sets_it() -> None:
    site = replace(
        dgx(),
        container=ContainerSite(runtime="apptainer", image="/i.sif"),
        setup=SetupSite(env={"HF_HOME": "$SCRATCH/hf/"}),
    )
    assert "$SCRATCH/hf:$SCRATCH/hf" in binds(plan(site, model=ModelSpec(model="org/llama")), RUN_DIR)


def test_the_directory_of_kv_blocks_that_outlive_the_run_is_bound() -> None:
    site = replace(
        dgx(),
        container=ContainerSite(runtime="apptainer", image="/i.sif"),
        storage=StorageSite(kv="/lustre/me/kv"),
    )
    shared = ModelSpec(model="org/llama", kv_offload=KvOffloadSpec(cpu_gib=1, shared_gib=10))
    assert "/lustre/me/kv:/lustre/me/kv" in binds(plan(site, model=shared), RUN_DIR)
    assert "/lustre/me/kv:/lustre/me/kv" not in binds(plan(site, model=ModelSpec(model="org/llama")), RUN_DIR)


def test_an_image_of_a_registry_is_used_from_the_cache() -> None:
    container = ContainerSite(runtime="apptainer", image="docker://a/b:1")
    found = words(apptainer_words(plan(replace(dgx(), container=container)), RUN_DIR))
    assert '"$HOME/.hpcserve/images/a-b-1-' in found


def test_no_gpu_flag_without_gpus() -> None:
    site = replace(local(), scheduler="slurm", container=ContainerSite(runtime="apptainer", image="/i.sif"))
    assert "--nv" not in apptainer_words(plan(site), RUN_DIR)


def test_pyxis_keeps_the_jobs_own_variables() -> None:
    found = pyxis_words(planned(), RUN_DIR)  # type: ignore[arg-type]
    assert "--container-env=A,HPCSERVE_RUN_DIR" in found
    assert {"--no-container-mount-home", "--no-container-remap-root"} <= set(found)
    # pyxis refuses both.
    found = pyxis_words(planned(args=("--container-remap-root",)), RUN_DIR)  # type: ignore[arg-type]
    assert "--no-container-remap-root" not in found


@pytest.mark.parametrize("agent", ["inside", "outside"])
def test_libraries_that_the_site_means_for_the_image_come_there(agent: str) -> None:
    container = ContainerSite(runtime="apptainer", image="/i.sif", agent=agent)  # type: ignore[arg-type]
    site = replace(dgx(), container=container, setup=SetupSite(env={"LD_LIBRARY_PATH": "/opt/x lib"}))
    script = render_script(plan(site), RUN_DIR)
    # With agents outside, each engine's own start sees to it.
    for name in ("APPTAINERENV_LD_LIBRARY_PATH", "SINGULARITYENV_LD_LIBRARY_PATH"):
        assert (f"export {name}='/opt/x lib'\n" in script) == (agent == "inside")
    assert "export LD_LIBRARY_PATH='/opt/x lib'\n" in script
