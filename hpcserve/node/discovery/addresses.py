"""The address of this node that the job's other nodes can reach."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import RendezvousError

_SIOCGIFADDR = 0x8915
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address and the network interface that has it."""

    address: str
    interface: str | None


def usable(address: str) -> bool:
    """False for loopback, link-local and unspecified addresses: other nodes can't reach those."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified or parsed.is_multicast)


def interfaces() -> dict[str, str]:
    """IPv4 address of each network interface that has one."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                # The interface has no IPv4 address.
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def source_towards(host: str) -> str | None:
    """The address packets to `host` would leave from; nothing is sent. None if `host` is unknown."""
    try:
        resolved = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in sorted(resolved, key=lambda entry: entry[0]):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def routable(peers: Iterable[str], *, interface: str | None, loopback: bool) -> Address:
    """Choose this node's address.

    `peers` are names or addresses of other nodes, the most telling first; `interface` is the site's
    `network.control_interface` and decides alone; `loopback` allows 127.0.0.1, for jobs that live on
    one machine. Raises RendezvousError when nothing is left.
    """
    if loopback:
        return Address(address=LOOPBACK, interface="lo")
    local = interfaces()
    if interface is not None:
        return _of_interface(interface, local)
    names = {address: name for name, address in local.items()}
    for candidate in _candidates(peers, local):
        if usable(candidate):
            return Address(address=candidate, interface=names.get(candidate))
    raise RendezvousError(
        f"{socket.gethostname()} has no address that other nodes can reach: only loopback or link-local ones"
        f" ({', '.join(f'{name} {address}' for name, address in local.items()) or 'no interfaces'})",
        hint="name the right interface as `network.control_interface` in the site config",
    )


def _candidates(peers: Iterable[str], local: dict[str, str]) -> Iterable[str]:
    for peer in peers:
        source = source_towards(peer)
        if source is not None:
            yield source
    # A job on one node has no peer: the node's own name, then any interface, answers.
    own = source_towards(socket.gethostname())
    if own is not None and own in local.values():
        yield own
    yield from local.values()


def _of_interface(interface: str, local: dict[str, str]) -> Address:
    address = local.get(interface)
    if address is None:
        raise RendezvousError(
            f"{socket.gethostname()} has no IPv4 address on interface {interface!r};"
            f" it has {', '.join(local) or 'none'}",
            hint="correct `network.control_interface` in the site config, or leave it out",
        )
    if not usable(address):
        raise RendezvousError(
            f"interface {interface!r} of {socket.gethostname()} has the address {address},"
            " which other nodes can't reach",
            hint="choose another `network.control_interface` in the site config",
        )
    return Address(address=address, interface=interface)


def in_url(address: str) -> str:
    """The address as it stands in a URL: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address
