"""Hosts made of network namespaces, joined by one bridge that is the login node's interface."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "hs-br"
LOGIN_ADDRESS = "10.77.0.254"
_HOSTS = Path("/etc/hosts")
_BEGIN, _END = "# hpcserve-testbed begin", "# hpcserve-testbed end"


@dataclass(frozen=True, slots=True)
class Host:
    """Node number `index`, counted from 1."""

    index: int

    @property
    def name(self) -> str:
        return f"n{self.index}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.index}"

    @property
    def namespace(self) -> str:
        return f"hs-n{self.index}"

    @property
    def namespace_file(self) -> str:
        return f"/run/netns/{self.namespace}"

    @property
    def link(self) -> str:
        """The bridge's end of the node's cable."""
        return f"hs-l{self.index}"


def ip(*arguments: str) -> str:
    """Run ip(8) and return what it prints; a failure raises with ip's own words."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def create(hosts: list[Host]) -> None:
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("address", "add", f"{LOGIN_ADDRESS}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    for host in hosts:
        ip("netns", "add", host.namespace)
        inside = ("-n", host.namespace)
        ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        ip("link", "set", host.link, "master", BRIDGE, "up")
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")


def existing() -> list[Host]:
    """Namespaces of this or a crashed cluster."""
    names = [line.split()[0] for line in ip("netns", "list").splitlines() if line]
    return [Host(int(name[4:])) for name in names if name.startswith("hs-n") and name[4:].isdigit()]


def remove() -> None:
    """Remove every namespace, cable and the bridge, also those of a crashed cluster."""
    for host in existing():
        ip("netns", "delete", host.namespace)
    for link in _links():
        if link == BRIDGE or (link.startswith("hs-l") and link[4:].isdigit()):
            try:
                ip("link", "delete", link)
            except RuntimeError:
                if link in _links():  # else the kernel removed it with its namespace, in this moment
                    raise


def _links() -> list[str]:
    return [line.split(":")[1].split("@")[0].strip() for line in ip("-o", "link").splitlines()]


def processes(host: Host) -> list[int]:
    """Every process that runs in the node's namespace."""
    return [int(pid) for pid in ip("netns", "pids", host.namespace).split()]


def cut_link(host: Host) -> None:
    ip("link", "set", host.link, "down")


def restore_link(host: Host) -> None:
    ip("link", "set", host.link, "up")


def hosts_text(hosts: list[Host], login: str) -> str:
    """The lines of /etc/hosts that name the cluster."""
    lines = [f"{host.address} {host.name}" for host in hosts]
    return "\n".join([_BEGIN, f"{LOGIN_ADDRESS} {login}", *lines, _END, ""])


def name_nodes_on_login(hosts: list[Host]) -> None:
    """Let the login node resolve the nodes. Its own name is left as it was."""
    forget_nodes_on_login()
    lines = [f"{host.address} {host.name}" for host in hosts]
    with _HOSTS.open("a") as file:
        file.write("\n".join([_BEGIN, *lines, _END, ""]))


def forget_nodes_on_login() -> None:
    text = _HOSTS.read_text()
    while _BEGIN in text:
        before, _, rest = text.partition(_BEGIN)
        text = before + rest.partition(_END + "\n")[2]
        _HOSTS.write_text(text)  # in place: in a container /etc/hosts is a mount
