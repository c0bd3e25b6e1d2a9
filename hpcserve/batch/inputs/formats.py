"""Which format a file has, by its suffix."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from ...config.load import nearest
from ...errors import ConfigError

Format = Literal["jsonl", "csv", "tsv", "parquet", "arrow"]
Family = Literal["JSON Lines", "CSV", "Parquet and Arrow"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSED = (".gz", ".zst")
"""May follow the suffix of a text format."""

FAMILIES: dict[Format, Family] = {
    "jsonl": "JSON Lines",
    "csv": "CSV",
    "tsv": "CSV",
    "parquet": "Parquet and Arrow",
    "arrow": "Parquet and Arrow",
}
"""Files of one family have columns of one kind, and can be read together."""

_ALLOWED = f"{', '.join(SUFFIXES)}; those of text also with {' or '.join(COMPRESSED)}"


def format_of(name: str) -> Format:
    """The format of a file of this name. Raises ConfigError."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSED
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    if not suffix:
        raise ConfigError(
            f"{name}: no suffix tells the format; allowed: {_ALLOWED}",
            hint="Rename the file, or make a link to it that has the suffix.",
        )
    found = SUFFIXES.get(suffix[0])
    if found is None:
        near = nearest(suffix[0], [*SUFFIXES, *COMPRESSED])
        raise ConfigError(
            f"{name}: the suffix {suffix[0]} is unknown; allowed: {_ALLOWED}",
            hint=f"Did you mean '{near}'?" if near else "Convert the file to one of these formats.",
        )
    if packed and FAMILIES[found] == "Parquet and Arrow":
        raise ConfigError(
            f"{name}: {suffix[0]} files are read in pieces, so they can't be inside {suffixes[-1]}",
            hint="Unpack the file; Parquet and Arrow can be compressed inside.",
        )
    return found
