"""Finding and reading the site config of this cluster.

A site is a file `NAME.yaml` in one of, first wins: the directories in $HPCSERVE_SITES,
~/.config/hpcserve/sites, /etc/hpcserve/sites, and the shipped ones. A file that begins with
`extends: NAME` is laid on that site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ConfigError
from .document import Items, Node, Scalar, Table, describe, merge, parse_document, read_text
from .load import Loaded, build, nearest
from .model import ModelSpec
from .resources import resources
from .site import Site

SYSTEM_SITES = Path("/etc/hpcserve/sites")
MIN_PORTS = 16
"""Fewer could not hold the endpoint, the controller and one node's engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Which file, and why."""

    path: Path
    where: str


def site_directories(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Directories searched for sites, first wins. Raises ConfigError for a bad $HPCSERVE_SITES."""
    result: list[Path] = []
    for entry in filter(None, environ.get("HPCSERVE_SITES", "").split(":")):
        directory = Path(entry)
        if not directory.is_dir():
            raise ConfigError(
                f"HPCSERVE_SITES: {entry} is not a directory",
                hint="Correct the variable: directories of site configs, separated by colons.",
            )
        result.append(directory)
    home = environ.get("HOME")
    config = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else None)
    if config:
        result.append(Path(config) / "hpcserve" / "sites")
    return (*result, SYSTEM_SITES, resources("site-configs"))


def site_files(environ: Mapping[str, str]) -> dict[str, tuple[Path, ...]]:
    """Every site's name with its files, the one that is used first."""
    found: dict[str, tuple[Path, ...]] = {}
    for directory in site_directories(environ):
        for path in _files(directory):
            found[path.stem] = (*found.get(path.stem, ()), path)
    return dict(sorted(found.items()))


def find_site(
    name: str | None,
    *,
    environ: Mapping[str, str],
    hostname: str,
    model: Loaded[ModelSpec] | None = None,
) -> Loaded[Site]:
    """The site to use: `--site` (`name`), HPCSERVE_SITE, model.yaml's `site`, else the host name's.

    A name that ends in `.yaml` is a file. Raises ConfigError when nothing decides.
    """
    files = site_files(environ)
    choice = _choose(name, files, environ, hostname, model)
    path = choice.path
    site, origins = build(Site, _with_name(_read(path, files, ()), path))
    _check(site, origins, path)
    return Loaded(value=site, origins=origins, file=str(path), where=choice.where)


def _files(directory: Path) -> Sequence[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".yaml")
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise ConfigError(
            f"{directory}: can't be read: {error.strerror}",
            hint="Ask its owner for permission, or name the site's file: --site FILE.yaml.",
        ) from error


def _choose(
    name: str | None,
    files: Mapping[str, tuple[Path, ...]],
    environ: Mapping[str, str],
    hostname: str,
    model: Loaded[ModelSpec] | None,
) -> _Choice:
    if name is not None:
        return _named(name, "--site", files)
    if environ.get("HPCSERVE_SITE"):
        return _named(environ["HPCSERVE_SITE"], "HPCSERVE_SITE", files)
    if model is not None and model.value.site is not None:
        return _named(model.value.site, model.origins["site"], files)
    return _by_hostname(hostname, files, environ)


def _named(name: str, where: str, files: Mapping[str, tuple[Path, ...]]) -> _Choice:
    if name.endswith(".yaml"):
        return _Choice(path=Path(name).expanduser(), where=where)
    if name not in files:
        close = nearest(name, files)
        raise ConfigError(
            f"{where}: there is no site '{name}'; known sites: {', '.join(files)}",
            hint=f"Did you mean '{close}'?" if close else "Name a file instead: --site FILE.yaml.",
        )
    return _Choice(path=files[name][0], where=where)


def _by_hostname(hostname: str, files: Mapping[str, tuple[Path, ...]], environ: Mapping[str, str]) -> _Choice:
    """The site whose `match.hostnames` fits. Directories are taken in order, because a user's site
    that extends a group's inherits its host names, and the user's is meant."""
    for directory in site_directories(environ):
        matches = [
            _Choice(path=path, where=f"host name {hostname} matches {pattern}")
            for path in (candidates[0] for candidates in files.values() if candidates[0].parent == directory)
            if (pattern := _matching(hostname, _read(path, files, ())))
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(
                f"several site configs match the host name {hostname}: "
                + ", ".join(str(choice.path) for choice in matches),
                hint="Name one with --site or HPCSERVE_SITE.",
            )
    raise ConfigError(
        f"no site config matches the host name {hostname}; known sites: {', '.join(files)}",
        hint="Name one with --site or HPCSERVE_SITE: `local` is this machine without Slurm, "
        "`generic-slurm` a start for any cluster.",
    )


def _matching(hostname: str, table: Table) -> str | None:
    """The pattern in `match.hostnames` that fits the host name or its part before the first dot."""
    section = table.entries.get("match")
    patterns = section.entries.get("hostnames") if isinstance(section, Table) else None
    # A section of a wrong shape is reported when the site is loaded.
    for pattern in patterns.values if isinstance(patterns, Items) else ():
        if isinstance(pattern, Scalar) and any(
            fnmatchcase(name, pattern.text.lower())
            for name in (hostname.lower(), hostname.lower().partition(".")[0])
        ):
            return pattern.text
    return None


def _read(path: Path, files: Mapping[str, tuple[Path, ...]], above: tuple[Path, ...]) -> Table:
    """The file's mapping, laid on that of the site it extends."""
    table = parse_document(read_text(path, what="site config"), str(path))
    entries = dict(table.entries)
    extends = entries.pop("extends", None)
    table = Table(entries=entries, origin=table.origin)
    if extends is None:
        return table
    base = _base(extends, path, files, (*above, path))
    below = _read(base, files, (*above, path))
    inherited = {key: node for key, node in below.entries.items() if key != "name"}
    return merge(Table(entries=inherited, origin=below.origin), table)


def _base(extends: Node, path: Path, files: Mapping[str, tuple[Path, ...]], above: tuple[Path, ...]) -> Path:
    """The file behind `extends`. A site may extend the one it hides: the next of the same name."""
    if not isinstance(extends, Scalar) or not extends.text:
        raise ConfigError(
            f"{extends.origin}: key 'extends' must be a site's name, not {describe(extends)}",
            hint=f"Known sites: {', '.join(files)}.",
        )
    candidates = files.get(extends.text, ())
    if not candidates:
        close = nearest(extends.text, files)
        raise ConfigError(
            f"{extends.origin}: key 'extends' names no site: '{extends.text}'; "
            f"known sites: {', '.join(files)}",
            hint=f"Did you mean '{close}'?" if close else "Name a known site.",
        )
    if path in candidates:
        candidates = candidates[candidates.index(path) + 1 :]
    base = next((candidate for candidate in candidates if candidate not in above), None)
    if base is None:
        raise ConfigError(
            f"{extends.origin}: key 'extends' leads back to this file: '{extends.text}'",
            hint="Extend another site, or remove the line.",
        )
    return base


def _with_name(table: Table, path: Path) -> Table:
    """A site is called like its file; `name` may be left out."""
    if "name" in table.entries:
        return table
    name = Scalar(text=path.stem, plain=False, origin=f"{path}:1")
    return Table(entries={"name": name, **table.entries}, origin=table.origin)


def _check(site: Site, origins: Mapping[str, str], path: Path) -> None:
    """What no single key shows."""
    if site.name != path.stem:
        raise ConfigError(
            f"{origins['name']}: key 'name' is '{site.name}', but the file is called {path.name}",
            hint=f"Rename the file to {site.name}.yaml, or remove the line.",
        )
    ports = site.ports
    if ports.high - ports.low + 1 < MIN_PORTS:
        at = origins.get("ports.high") or origins.get("ports.low") or f"{path}:1"
        raise ConfigError(
            f"{at}: keys 'ports.low' and 'ports.high' must hold at least {MIN_PORTS} ports, "
            f"not {ports.low}-{ports.high}",
            hint="Widen the range; 20000 to 29999 is the default.",
        )
    limit = site.slurm.max_walltime
    if limit is not None and site.slurm.default_walltime > limit:
        at = origins.get("slurm.default_walltime") or origins["slurm.max_walltime"]
        raise ConfigError(
            f"{at}: key 'slurm.default_walltime' ({site.slurm.default_walltime} s) must not exceed "
            f"'slurm.max_walltime' ({limit} s)",
            hint="Lower the default or raise the limit.",
        )
    if site.container.runtime == "none" and site.container.image is not None:
        raise ConfigError(
            f"{origins['container.image']}: key 'container.image' needs 'container.runtime'; "
            "allowed: pyxis, apptainer",
            hint="Name the runtime, or remove the image.",
        )
    if site.container.runtime != "none" and site.container.image is None:
        raise ConfigError(
            f"{origins['container.runtime']}: key 'container.runtime' is {site.container.runtime}, "
            "but 'container.image' is missing",
            hint="Name an image that holds hpcserve and the engine.",
        )
