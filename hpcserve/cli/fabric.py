"""What `status --fabric` prints: fabric.json as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from .output import print_json, table

if TYPE_CHECKING:
    from ..rundir.runs import Run


def show(run: Run, *, as_json: bool) -> None:
    """Raises RunError while the run's nodes have not met, or for a run without a fabric.json."""
    from ..rundir.atomic import read_json

    try:
        fabric = read_json(run.directory.fabric)
    except FileNotFoundError as error:
        raise RunError(
            f"run {run.record.run_id} has no {run.directory.fabric.name}: its nodes have not met yet",
            hint=f"`hpcserve status {run.record.run_id}` shows how far it is",
        ) from error
    if as_json:
        print_json({"name": run.record.run_id, **fabric})
        return
    print("\n\n".join(_tables(fabric)))


def _tables(fabric: Mapping[str, Any]) -> Iterator[str]:
    nodes, replicas = fabric["nodes"], fabric["replicas"]
    gpus = [
        (node["node"], str(gpu["index"]), _text(gpu["numa"]), _text(gpu["relation"]), _ports(gpu))
        for node in nodes
        for gpu in node["gpus"]
    ]
    if gpus:
        yield table(("NODE", "GPU", "NUMA", "NEAR", "PORTS"), gpus)
    ports = [
        (node["node"], port["name"], port["link_layer"], port["state"], f"{port['rate_gbps']:g}", port["why"])
        for node in nodes
        for port in node["ports"]
    ]
    if ports:
        yield table(("NODE", "PORT", "LINK", "STATE", "GBIT/S", "USE"), ports)
    yield table(
        ("NODE", "LEAF OR BLOCK", "NVLINK DOMAIN", "IMEX", "SLINGSHOT"),
        [
            (
                node["node"],
                _text(node["leaf"]),
                _text(node["nvlink_domain"] or node["nvlink_trouble"]),
                _imex(node["imex"]),
                ",".join(node["slingshot"]) or "-",
            )
            for node in nodes
        ],
    )
    yield table(
        ("REPLICA", "NODE", "VARIABLE", "VALUE", "WHY"),
        [
            (replica["replica"], replica["node"], setting["name"], setting["value"], setting["why"])
            for replica in replicas
            for setting in replica["settings"]
        ],
    )


def _ports(gpu: Mapping[str, Any]) -> str:
    lost = f" (lost: {', '.join(gpu['lost'])})" if gpu["lost"] else ""
    return (",".join(gpu["ports"]) or "-") + lost


def _imex(imex: Mapping[str, Any] | None) -> str:
    if imex is None:
        return "-"
    channels = f"channels {','.join(map(str, imex['channels']))}" if imex["channels"] else "no channel"
    return f"{channels}, {imex['status'] or 'domain unknown'}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
