"""What a container sees of the node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcserve.config.model import ModelSpec
from hpcserve.config.site import ContainerSite, SetupSite, StorageSite
from hpcserve.render.containers import apptainer_words, binds, pyxis_words
from hpcserve.render.quoting import words

from .cases import RUN_DIR, dgx, local, plan


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
        ((), "/models/llama", [f"{RUN_DIR}:{RUN_DIR}", "/models/llama:/models/llama:ro"]),
        (("/models:/models:ro",), "/models/llama", ["/models:/models:ro", f"{RUN_DIR}:{RUN_DIR}"]),
        (("/scratch",), "org/llama", ["/scratch"]),
        (
            ("/mod:/mod",),
            "/models/llama",
            ["/mod:/mod", f"{RUN_DIR}:{RUN_DIR}", "/models/llama:/models/llama:ro"],
        ),
        (
            ("/models:/other",),
            "/models/x",
            ["/models:/other", f"{RUN_DIR}:{RUN_DIR}", "/models/x:/models/x:ro"],
        ),
    ],
)
def test_binds(own: tuple[str, ...], model: str, expected: list[str]) -> None:
    assert binds(planned(*own, model=model), RUN_DIR) == expected  # type: ignore[arg-type]


def test_node_local_storage_is_named_by_the_node() -> None:
    text = words(apptainer_words(planned(node_local="$SLURM_TMPDIR"), RUN_DIR))  # type: ignore[arg-type]
    assert '"--bind=$SLURM_TMPDIR:$SLURM_TMPDIR"' in text


def test_apptainer_flags_of_the_site_come_before_the_image() -> None:
    found = apptainer_words(planned(args=("--cleanenv",)), RUN_DIR)  # type: ignore[arg-type]
    assert found[:3] == ["apptainer", "exec", "--nv"]
    assert found[-2:] == ["--cleanenv", "/i.sif"]


def test_no_gpu_flag_without_gpus() -> None:
    site = replace(local(), scheduler="slurm", container=ContainerSite(runtime="apptainer", image="/i.sif"))
    assert "--nv" not in apptainer_words(plan(site), RUN_DIR)


def test_pyxis_keeps_the_jobs_own_variables() -> None:
    found = pyxis_words(planned(), RUN_DIR)  # type: ignore[arg-type]
    assert "--container-env=A,HPCSERVE_RUN_DIR" in found
    assert "--no-container-mount-home" in found
