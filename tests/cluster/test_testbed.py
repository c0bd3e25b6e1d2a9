"""The test cluster is what the other tests take it for."""

from __future__ import annotations

from . import paths
from .slurm_conf import GPUS_PER_NODE
from .testbed import Testbed, wait_for

_WORLD = """
from mpi4py import MPI
world = MPI.COMM_WORLD
print(world.rank, world.size, *world.allgather(MPI.Get_processor_name()))
"""


def test_four_nodes_are_idle_and_run_what_a_user_starts(cluster: Testbed) -> None:
    assert cluster.node_states() == {"n1": "idle", "n2": "idle", "n3": "idle", "n4": "idle"}
    out = cluster.as_user("hsuser", ["srun", "-N4", "-n4", "sh", "-c", "echo $(hostname) $(id -un)"]).stdout
    assert sorted(out.splitlines()) == ["n1 hsuser", "n2 hsuser", "n3 hsuser", "n4 hsuser"]


def test_mpi_under_srun_pmix_is_one_world_over_four_hosts(cluster: Testbed) -> None:
    done = cluster.as_user("hsuser", ["srun", "--mpi=pmix", "-N4", "-n4", str(paths.PYTHON), "-c", _WORLD])
    assert sorted(done.stdout.splitlines()) == [f"{rank} 4 n1 n2 n3 n4" for rank in range(4)]


def test_mpi_without_a_plugin_is_a_world_of_one(cluster: Testbed) -> None:
    """The wrong plugin does not fail: every rank is alone. The rendezvous has to notice."""
    done = cluster.as_user("hsuser", ["srun", "--mpi=none", "-N2", "-n2", str(paths.PYTHON), "-c", _WORLD])
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["0", "1"], ["0", "1"]]


def test_gpus_are_visible_only_as_asked_for(cluster: Testbed) -> None:
    show = ["sh", "-c", "echo ${CUDA_VISIBLE_DEVICES-none}"]
    for asked, seen in ((GPUS_PER_NODE, "0,1,2,3"), (2, "0,1")):
        assert cluster.as_user("hsuser", ["srun", f"--gres=gpu:{asked}", *show]).stdout.strip() == seen
    assert cluster.as_user("hsuser", ["srun", *show]).stdout.strip() == "none"


def test_a_job_may_have_all_gpus_of_any_two_nodes(cluster: Testbed) -> None:
    """Whichever of them Slurm gives it, also in a step of the job."""
    for nodes in ("n1,n2", "n3,n4"):
        inside = f"srun --gres=gpu:{GPUS_PER_NODE} hostname"
        done = cluster.as_user(
            "hsuser",
            ["salloc", "-N2", f"--nodelist={nodes}", f"--gres=gpu:{GPUS_PER_NODE}", "sh", "-c", inside],
        )
        assert sorted(done.stdout.split()) == nodes.split(",")


def test_nodes_share_the_home_directory_and_nothing_else(cluster: Testbed) -> None:
    script = "echo here > /tmp/mark; echo $(hostname) > ~/mark-$(hostname)"
    cluster.as_user("hsuser", ["sh", "-c", script], node="n1")
    assert cluster.as_user("hsuser", ["cat", "mark-n1"], node="n2").stdout == "n1\n"
    assert cluster.as_user("hsuser", ["ls", "/tmp/mark"], node="n2", check=False).returncode != 0
    assert cluster.as_user("hsuser", ["ls", "/sys/class/net"], node="n2").stdout.split() == ["eth0", "lo"]
    cluster.home("hsuser").joinpath("mark-n1").unlink()


def test_users_run_the_checkouts_own_package(cluster: Testbed) -> None:
    where = cluster.python("hsuser", "-c", "import hpcserve; print(hpcserve.__file__)").strip()
    assert where == str(paths.MOUNTED / "hpcserve/__init__.py")


def test_a_cut_link_isolates_a_node_until_it_is_restored(cluster: Testbed) -> None:
    connect = "import socket; socket.create_connection(('n2', 16818), timeout=1)"  # n2's slurmd

    def reachable() -> bool:
        return cluster.as_user("hsuser", ["python3", "-c", connect], node="n1", check=False).returncode == 0

    assert reachable()
    cluster.cut_link("n2")
    assert not reachable()
    cluster.restore_link("n2")
    wait_for(reachable, what="n2 to answer again")


def test_a_job_with_no_kill_outlives_one_of_its_nodes(cluster: Testbed) -> None:
    tick = "while :; do date +%s > ~/alive-$(hostname); sleep 0.2; done"
    step = f"srun --no-kill --kill-on-bad-exit=0 -N2 -n2 sh -c '{tick}'"
    home = cluster.home("hsuser")
    for path in home.glob("alive-*"):
        path.unlink()  # of an earlier session: homes outlive the cluster
    sbatch = ["sbatch", "--parsable", "--no-kill", "--nodelist=n1,n2", f"--output={home}/job.log"]
    job = cluster.as_user("hsuser", [*sbatch, f"--wrap={step}"]).stdout.strip()
    wait_for(lambda: len([*home.glob("alive-*")]) == 2, what="the step to run on both nodes")

    cluster.kill_node("n2")
    assert not cluster.is_up("n2")
    wait_for(
        lambda: cluster.node_states()["n2"].startswith("down"), seconds=60, what="Slurm to notice",
        state=cluster.node_states,
    )  # fmt: skip
    before = (home / "alive-n1").read_text()
    wait_for(lambda: (home / "alive-n1").read_text() > before, what="n1 to go on")
    assert cluster.slurm("squeue", "--noheader", "--jobs", job, "--format=%T").strip() == "RUNNING"

    cluster.start_node("n2")
    cluster.as_user("hsuser", ["scancel", job])
    cluster.wait_until_idle("n1", "n2")
    for name in ("alive-n1", "alive-n2", "job.log"):
        (home / name).unlink()


def test_secrets_of_one_user_are_hidden_from_another(cluster: Testbed) -> None:
    secret = cluster.home("hsuser") / "secret"
    cluster.as_user("hsuser", ["sh", "-c", f"umask 077; echo s3cret > {secret}"])
    denied = cluster.as_user("hsother", ["cat", str(secret)], check=False)
    assert denied.returncode != 0 and "s3cret" not in denied.stdout
    secret.unlink()
