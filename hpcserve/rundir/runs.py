"""Run directories as a whole: make one, find one, list them all."""

from __future__ import annotations

import contextlib
import difflib
import errno
import grp
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import ConfigError, HpcserveError, RunError, StorageError, UsageError
from .atomic import read_json, storage_error, write_json, write_text
from .layout import RunDir

RUNS_VARIABLE = "HPCSERVE_RUNS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHORT_ID = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """run.json."""

    name: str
    """What was asked for; several runs may share it."""
    run_id: str
    """The directory's name: unique below its runs directory."""
    site: str
    scheduler: str
    """`slurm` or `local`."""
    job_id: str | None
    """None until it is submitted."""
    user: str
    host: str
    """Where `hpcserve launch` ran; a local job can only be seen from there."""
    created: float
    """Unix seconds."""
    version: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    directory: RunDir
    record: RunRecord


class NameTaken(StorageError):
    """Another launch made a run directory of this id a moment ago."""


def runs_root(configured: str, environ: Mapping[str, str]) -> Path:
    """Where run directories are: HPCSERVE_RUNS, else the site's `storage.runs`, expanded."""
    variable = environ.get(RUNS_VARIABLE)
    text = os.path.expandvars(os.path.expanduser(variable or configured))
    if "$" in text or not text.startswith("/"):
        where = RUNS_VARIABLE if variable else "`storage.runs` of the site"
        raise ConfigError(
            f"{where}: {text!r} is not an absolute path once ~ and $VARIABLES are filled in",
            hint="set HPCSERVE_RUNS to a directory that all nodes share",
        )
    return Path(text)


def check_name(name: str) -> str:
    """A run's name becomes a directory, a job name and part of socket paths. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r} must be 1 to 64 letters, digits, `.`, `_` or `-`, beginning with a "
            "letter or digit",
            hint="for example `--name llama-70b`",
        )
    return name


def free_run_id(root: Path, name: str) -> str:
    """`name` if no run has it, else `name-` and four characters. Raises UsageError, StorageError."""
    run_id = check_name(name)
    while _exists(root / run_id):
        run_id = f"{name}-{''.join(_SHORT_ID[byte % 32] for byte in os.urandom(4))}"
    return run_id


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a parent that may not be entered, a path that is too long
        raise storage_error(error, "look for") from error


def create_run(
    root: Path, record: RunRecord, files: Mapping[str, str], *, group: str | None, api_key: bool
) -> RunDir:
    """Make `root`/`record.run_id` with run.json, `files` (relative path -> text) and secrets.

    It appears whole or not at all. Directories are 0700, or with `group` 0750 and of that group,
    which can then read everything but the job key. Raises StorageError, ConfigError, and NameTaken
    when there is a run of that id.
    """
    group_id = _group_id(group)
    run = RunDir(root / record.run_id)
    temporary: Path | None = None
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not below its final name: another launch, or `hpcserve ls`, must never see half of it.
        temporary = Path(tempfile.mkdtemp(prefix=f".{record.run_id}.", dir=root))
        _fill(RunDir(temporary), record, files, group_id, api_key=api_key)
        _publish(temporary, run.path)
        temporary = None
    except OSError as error:
        raise storage_error(error, "make the run directory") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return run


def _publish(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise NameTaken(f"there is a run {final} already", hint="choose another --name") from error


def _fill(
    run: RunDir, record: RunRecord, files: Mapping[str, str], group_id: int | None, *, api_key: bool
) -> None:
    shared = group_id is not None
    nested = {(run.path / name).parent for name in files}
    for directory in sorted({run.path, run.secrets, run.ranks, run.logs} | nested):
        directory.mkdir(exist_ok=True)
        if group_id is not None:
            os.chown(directory, -1, group_id)
        # setgid: what the job writes later belongs to the group, too.
        os.chmod(directory, 0o2750 if shared else 0o700)
    for name, text in files.items():
        write_text(run.path / name, text)
    import secrets  # brings in hashlib, which a dry run has no use for

    if api_key:
        write_text(run.api_key, f"hs-{secrets.token_urlsafe(32)}\n")
    write_text(run.logs / "job.log", "")  # or the job would make it with the caller's umask
    write_text(run.job_key, f"{secrets.token_urlsafe(32)}\n", mode=0o600)
    write_record(run, record)


def write_record(run: RunDir, record: RunRecord) -> None:
    write_json(run.run, {field.name: getattr(record, field.name) for field in fields(record)})


def remove_run(run: RunDir) -> None:
    """Undo create_run, for a job that was never submitted."""
    try:
        shutil.rmtree(run.path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "remove") from error


def _group_id(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        found = grp.getgrnam(group).gr_gid
    except KeyError as error:
        near = difflib.get_close_matches(group, _my_groups(), n=1)
        raise ConfigError(
            f"`group`: there is no Unix group {group!r} here",
            hint=f"did you mean `{near[0]}`?" if near else f"you are in: {', '.join(_my_groups())}",
        ) from error
    if os.geteuid() != 0 and found not in {os.getegid(), *os.getgroups()}:
        raise ConfigError(
            f"`group`: you are not in the Unix group {group!r}",
            hint=f"you are in: {', '.join(_my_groups())}",
        )
    return found


def _my_groups() -> list[str]:
    names = []
    for number in sorted({os.getegid(), *os.getgroups()}):
        with contextlib.suppress(KeyError):  # a group known by number only
            names.append(grp.getgrgid(number).gr_name)
    return names


def read_run(path: Path) -> Run:
    """Raises RunError when `path` is no run directory, StorageError when it can't be read."""
    try:
        value = read_json(RunDir(path).run)
    except FileNotFoundError as error:
        raise RunError(f"{path} is not a run directory: it has no run.json") from error
    known = {field.name for field in fields(RunRecord)}
    try:
        values = {name: value[name] for name in known}
        record = RunRecord(**values | {"command": tuple(values["command"])})
    except (TypeError, KeyError) as error:
        raise RunError(
            f"{path / 'run.json'} lacks {error}", hint="was it written by another version of hpcserve?"
        ) from error
    return Run(RunDir(path), record)


def list_runs(roots: Iterable[Path]) -> tuple[list[Run], list[HpcserveError]]:
    """All runs you can read below `roots`, newest first, and what is wrong with the others."""
    found: dict[Path, Run] = {}
    errors: list[HpcserveError] = []
    for root in roots:
        try:
            found |= {run.directory.path: run for run in _runs_below(root, errors)}
        except OSError as error:
            errors.append(storage_error(error, "list"))
    return sorted(found.values(), key=lambda run: run.record.created, reverse=True), errors


def _runs_below(root: Path, errors: list[HpcserveError]) -> Iterator[Run]:
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return
    for name in names:
        path = root / name / "run.json"
        # Somebody else's run in a shared directory is none of ours; its run.json is unreadable.
        if name.startswith(".") or not os.access(path, os.R_OK):
            continue
        try:
            yield read_run(root / name)
        except HpcserveError as error:
            if _exists(path):  # else it was removed in this moment
                errors.append(error)


def find_run(text: str, runs: Sequence[Run], live: Callable[[Sequence[Run]], Sequence[bool]]) -> Run:
    """The run of `runs` (newest first) that is meant by an id, a name, a job id or a beginning of an id.

    Several runs may have one name: a live one is meant rather than one that is over, and the newest
    of those; `live` tells them apart, and is asked only then. Raises RunError with near names.
    """
    named = [run for run in runs if run.record.name == text]
    if named:
        # The first run of a name has it as its id, too: that must not make it the one that is meant.
        return next((run for run, is_live in zip(named, live(named), strict=True) if is_live), named[0])
    for exact in (
        [run for run in runs if run.record.run_id == text],
        [run for run in runs if run.record.job_id == text],
        [run for run in runs if run.record.run_id.startswith(text)],
    ):
        if len({run.record.name for run in exact}) == 1 and len(exact) > 1:
            return find_run(exact[0].record.name, exact, live)
        if len(exact) == 1:
            return exact[0]
        if exact:
            names = ", ".join(f"`{run.record.run_id}`" for run in exact[:5])
            raise RunError(f"{text!r} fits {len(exact)} runs: {names}", hint="give more of the name")
    near = difflib.get_close_matches(text, [run.record.run_id for run in runs], n=3)
    raise RunError(
        f"no run is called {text!r}" if runs else f"no run is called {text!r}: there are none at all",
        hint=f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
        if near
        else "`hpcserve ls` lists your runs",
    )


def read_key(path: Path) -> str:
    """A secret. Raises RunError when it may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except PermissionError as error:
        raise RunError(f"you may not read {path}", hint="ask its owner for access") from error
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing", hint="the run has no key, or it was removed") from error
    except OSError as error:
        raise storage_error(error, "read") from error
