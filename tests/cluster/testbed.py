"""A real Slurm cluster on one machine: `python -m tests.cluster.testbed up|down|status|shell-env`.

Every node is a network, mount, host-name and IPC namespace with its own slurmd, its own /tmp and /dev/shm
and an address on a bridge; this machine is the login node. Needs root and Debian's packages (install.sh).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.patience import DEADLINE

from . import namespaces, paths, processes, slurm_conf, users
from .namespaces import Host

_NODE_SHELL = r"""
set -e
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /run/pmix
mount --bind "$2/hosts" /etc/hosts
mount --rbind /sys/fs/cgroup "$2/cgroup"
mount -t sysfs sysfs /sys          # this namespace's interfaces in /sys/class/net …
mount --rbind "$2/cgroup" /sys/fs/cgroup   # … and the cgroups slurmd asks for
exec slurmd -D -N "$1"
"""


@dataclass(frozen=True, slots=True)
class Testbed:
    """A running cluster."""

    __test__ = False  # pytest: a fixture's type, not a test

    hosts: tuple[Host, ...]

    def host(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    # Users and commands

    def as_user(
        self,
        user: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        node: str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as `user` on the login node, or on a node, from the user's home directory."""
        done = subprocess.run(
            self._command(user, argv, node),
            env=self.environment(user) | dict(env or {}),
            cwd=self.home(user),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise AssertionError(f"{shlex.join(argv)} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start_as_user(
        self, user: str, argv: Sequence[str], env: Mapping[str, str], *, node: str, output: IO[str]
    ) -> subprocess.Popen[str]:
        """Start a command in a session of its own, outside Slurm, with only this environment added."""
        return subprocess.Popen(
            self._command(user, argv, node),
            env=self.environment(user) | dict(env),
            cwd=self.home(user),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def python(self, user: str, *arguments: str, timeout: float = 60, check: bool = True) -> str:
        """Standard output of the checkout's own Python."""
        return self.as_user(user, [str(paths.PYTHON), *arguments], timeout=timeout, check=check).stdout

    @staticmethod
    def home(user: str) -> Path:
        return paths.SHARED / "home" / user

    @classmethod
    def environment(cls, user: str) -> dict[str, str]:
        """What a fresh login of the user has."""
        return {
            "HOME": str(cls.home(user)),
            "USER": user,
            "LOGNAME": user,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": f"{paths.PYTHON.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "SLURM_CONF": str(paths.SLURM_CONF),
        }

    @classmethod
    def _command(cls, user: str, argv: Sequence[str], node: str | None) -> list[str]:
        entry = pwd.getpwnam(user)
        become = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", *argv]
        if node is None:
            return become
        pid = processes.running(f"slurmd-{node}")
        if pid is None:
            raise RuntimeError(f"{node} is down")
        return [
            "nsenter",
            "-t",
            str(pid),
            "--net",
            "--uts",
            "--ipc",
            "--mount",
            f"--wdns={cls.home(user)}",
            *become,
        ]

    # Faults

    def start_node(self, name: str) -> None:
        """Start the node's slurmd; /tmp is empty then, as after a reboot."""
        host = self.host(name)
        processes.start(
            f"slurmd-{name}",
            [
                "nsenter", f"--net={host.namespace_file}",
                "unshare", "--uts", "--ipc", "--mount", "--propagation", "private",
                "sh", "-c", _NODE_SHELL, "sh", name, str(paths.RUN),
            ],
            _root_environment(),
        )  # fmt: skip

    def kill_node(self, name: str, *, power_cut: bool = False) -> None:
        """Kill all that runs on a node. With `power_cut` its link goes first, so that nobody hears of it."""
        host = self.host(name)
        if power_cut:
            self.cut_link(name)
        deadline = time.monotonic() + DEADLINE
        while alive := namespaces.processes(host):
            processes.kill(alive)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of {name} do not die: {alive}")
        processes.stop(f"slurmd-{name}")

    @contextmanager
    def frozen_slurmd(self, name: str) -> Iterator[None]:
        """The node's slurmd takes no orders meanwhile, and Slurm does not know yet."""
        # An ended job that this node has not confirmed would keep Slurm from giving it another.
        self.wait_until_idle()
        pid = processes.running(f"slurmd-{name}")
        assert pid is not None, f"{name} is down"
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            # Orders it missed would wait for Slurm's next try; a new one has missed none.
            self.kill_node(name)
            self.revive_node(name)

    @staticmethod
    def is_up(name: str) -> bool:
        return processes.running(f"slurmd-{name}") is not None

    def revive_node(self, name: str) -> None:
        """Start a killed node again. Slurm is told that it was down, so that it need not find out."""
        self.slurm("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")
        self.restore_link(name)
        self.start_node(name)

    def repair(self) -> None:
        """All links and nodes up again."""
        for host in self.hosts:
            self.restore_link(host.name)
            if not self.is_up(host.name):
                self.revive_node(host.name)

    def cut_link(self, name: str) -> None:
        namespaces.cut_link(self.host(name))

    def restore_link(self, name: str) -> None:
        namespaces.restore_link(self.host(name))

    def processes(self, name: str) -> list[int]:
        return namespaces.processes(self.host(name))

    def processes_of(self, user: str, name: str) -> dict[int, str]:
        """The user's processes on a node: id -> command line."""
        uid = pwd.getpwnam(user).pw_uid
        found = {}
        for pid in self.processes(name):
            try:
                if Path(f"/proc/{pid}").stat().st_uid == uid:
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
        return found

    def commands_of(self, user: str, name: str) -> list[str]:
        """Command lines of the user's processes on a node."""
        return list(self.processes_of(user, name).values())

    # Slurm

    def slurm(self, *argv: str, check: bool = True) -> str:
        """Output of a Slurm command run as root on the login node."""
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=_root_environment())
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """Node name -> Slurm's compact state (`idle`, `alloc`, `down*`)."""
        rows = self.slurm("sinfo", "--noheader", "--Node", "--format=%N %t").split("\n")
        return {name: state for name, state in (row.split() for row in rows if row)}

    def wait_until_idle(self, *names: str) -> None:
        wanted = names or tuple(host.name for host in self.hosts)

        def idle() -> bool:
            states = self.node_states()
            return all(states[name] == "idle" for name in wanted)

        wait_for(idle, what=f"nodes {', '.join(wanted)} to be idle", state=self.node_states)

    def cancel_jobs(self) -> None:
        """Cancel all jobs and wait until their nodes are free again."""
        for user in users.USERS:
            self.slurm("scancel", "--user", user)
        wait_for(
            lambda: not self.slurm("squeue", "--noheader"), what="the queue to empty",
            state=lambda: self.slurm("squeue"),
        )  # fmt: skip


def wait_for(
    condition: Callable[[], object],
    *,
    what: str,
    seconds: float = DEADLINE,
    state: Callable[[], object] = lambda: "",
    pause: float = 0.1,
) -> None:
    """Wait until `condition()` holds; after `seconds`, fail with what was waited for and `state()`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}: {state()}")
        time.sleep(pause)


@contextmanager
def machine_lock(*, seconds: float = 0) -> Iterator[None]:
    """One user of the test cluster at a time on this machine."""
    with paths.LOCK.open("w") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError("another process uses this machine's test cluster") from None
                time.sleep(0.5)
        yield


def up(nodes: int = 4) -> Testbed:
    """Bring the cluster up; what a crashed one left is removed first."""
    down()
    hosts = [Host(index) for index in range(1, nodes + 1)]
    testbed = Testbed(tuple(hosts))
    _make_files(hosts)
    users.create_users()
    users.mount_checkout(paths.RUN)
    namespaces.create(hosts)
    namespaces.name_nodes_on_login(hosts)
    _start_munge()
    processes.start("slurmctld", ["slurmctld", "-D", "-i"], _root_environment())
    for host in hosts:
        testbed.start_node(host.name)
    (paths.RUN / "testbed.json").write_text(json.dumps({"nodes": nodes, "checkout": str(paths.CHECKOUT)}))

    def ready() -> bool:
        _daemons_live(hosts)
        return "DOWN" not in testbed.slurm("scontrol", "ping", check=False)

    wait_for(ready, what="slurmctld to answer")
    testbed.wait_until_idle()
    return testbed


def running() -> Testbed | None:
    """The cluster that is up for this checkout with all its daemons alive, if there is one."""
    try:
        state = json.loads((paths.RUN / "testbed.json").read_text())
    except FileNotFoundError:
        return None
    hosts = tuple(Host(index) for index in range(1, state["nodes"] + 1))
    names = ["munged", "slurmctld", *(f"slurmd-{host.name}" for host in hosts)]
    if state["checkout"] != str(paths.CHECKOUT) or not all(map(processes.running, names)):
        return None
    return Testbed(hosts)


def down() -> None:
    """Stop everything `up` started and remove its mounts, namespaces and files; users and homes stay."""
    if paths.PIDS.is_dir():
        processes.stop("slurmctld")  # first, so that it does not write state while nodes vanish
    for host in namespaces.existing():
        processes.kill(namespaces.processes(host))
    if paths.PIDS.is_dir():
        for record in sorted(paths.PIDS.iterdir()):
            processes.stop(record.name)
    namespaces.remove()
    namespaces.forget_nodes_on_login()
    users.unmount_checkout()
    if paths.RUN.is_dir():
        shutil.rmtree(paths.RUN)


def _make_files(hosts: list[Host]) -> None:
    login = socket.gethostname().partition(".")[0]
    inside = [paths.RUN / name for name in ("state", "cgroup", "spool")]
    for directory in (
        paths.RUN,
        paths.LOGS,
        paths.PIDS,
        paths.GPUS,
        paths.PLUGINS,
        paths.MUNGE_SOCKET.parent,
        Path("/run/pmix"),
        *inside,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
    paths.SHARED.mkdir(parents=True, exist_ok=True)
    for text, name in (
        (slurm_conf.slurm_conf(hosts, login), "slurm.conf"),
        (slurm_conf.gres_conf(hosts), "gres.conf"),
        (slurm_conf.mpi_conf(), "mpi.conf"),
        (slurm_conf.cgroup_conf(), "cgroup.conf"),
        (slurm_conf.plugstack_conf(), "plugstack.conf"),
        ("127.0.0.1 localhost\n" + namespaces.hosts_text(hosts, login), "hosts"),
    ):
        (paths.RUN / name).write_text(text)
        (paths.RUN / name).chmod(0o644)
    for index in range(slurm_conf.GPUS_PER_NODE):
        device = paths.GPUS / f"gpu{index}"
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        device.chmod(0o666)


def _start_munge() -> None:
    key = paths.RUN / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    processes.start(
        "munged",
        [
            "munged", "--foreground", f"--socket={paths.MUNGE_SOCKET}", f"--key-file={key}",
            f"--pid-file={paths.RUN}/munged.pid", f"--log-file={paths.LOGS}/munged.log",
            f"--seed-file={paths.RUN}/munged.seed", "--num-threads=2",
        ],
        _root_environment(),
    )  # fmt: skip
    wait_for(paths.MUNGE_SOCKET.exists, what="munged's socket")


def _daemons_live(hosts: list[Host]) -> None:
    for name in ["munged", "slurmctld", *(f"slurmd-{host.name}" for host in hosts)]:
        if processes.running(name) is None:
            output = (paths.LOGS / f"{name}.out").read_text()[-2000:]
            raise RuntimeError(f"{name} died: {output}")


def _root_environment() -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(paths.SLURM_CONF),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.testbed", description=__doc__)
    parser.add_argument("action", choices=("up", "down", "status", "shell-env"))
    parser.add_argument("--nodes", type=int, default=4, help="nodes of the cluster (default: 4)")
    options = parser.parse_args(argv)
    if options.action == "up":
        with machine_lock():
            up(options.nodes)
        print(f"up: {options.nodes} nodes; export SLURM_CONF={paths.SLURM_CONF}")
    elif options.action == "down":
        with machine_lock():
            down()
    elif options.action == "shell-env":
        for name, value in Testbed.environment("hsuser").items():
            print(f"export {name}={shlex.quote(value)}")
    else:
        testbed = running()
        if testbed is None:
            print("down")
            return 1
        print(testbed.slurm("sinfo"), testbed.slurm("squeue"), sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
