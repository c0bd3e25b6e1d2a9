"""A Slurm of six shell scripts: each writes down how it was called and says what it was told to."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")

_STUB = """#!/bin/sh
here={here}
printf '%s' "{program}" >> "$here/calls"
for word in "$@"; do printf ' %s' "$word" >> "$here/calls"; done
echo >> "$here/calls"
env > "$here/{program}.env"
[ -e "$here/{program}.pause" ] && exec sleep "$(cat "$here/{program}.pause")"
[ -e "$here/{program}.hook" ] && . "$here/{program}.hook"
[ -e "$here/{program}.err" ] && cat "$here/{program}.err" >&2
[ -e "$here/{program}.out" ] && cat "$here/{program}.out"
[ -e "$here/{program}.rc" ] && exit "$(cat "$here/{program}.rc")"
exit 0
"""


class FakeSlurm:
    """Tests tell it a story: `accepts(42)`, `shows("42|RUNNING|…")`, `refuses("…")`, `is_down()`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        for program in PROGRAMS:
            stub = self.bin / program
            stub.write_text(_STUB.format(here=shlex.quote(str(directory)), program=program))
            stub.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.bin}:{os.environ['PATH']}"

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "PATH": self.path}

    def accepts(self, job_id: int) -> None:
        self.says("sbatch", f"{job_id}\n")

    def refuses(self, text: str) -> None:
        self.says("sbatch", "", error=f"sbatch: error: {text}\n", status=1)

    def shows(self, *lines: str) -> None:
        """What squeue knows, one line per job: `ID|STATE|START|END|NODES|REASON`."""
        self.says("squeue", "".join(f"{line}\n" for line in lines))

    def remembers(self, *lines: str) -> None:
        """What sacct knows: `ID|STATE|START|END|NODES|EXIT`."""
        self.says("sacct", "".join(f"{line}\n" for line in lines))

    def forgets_everything(self) -> None:
        """The one job asked for is older than MinJobAge, and there is no accounting."""
        self.says("squeue", "", error="slurm_load_jobs error: Invalid job id specified\n", status=1)
        self.says("sacct", "", error="Slurm accounting storage is disabled\n", status=1)

    def is_down(self) -> None:
        text = "error: Unable to contact slurm controller (connect failure)\n"
        for program in PROGRAMS:
            self.says(program, "", error=f"{program}: {text}", status=1)

    def runs(self, shell: str) -> None:
        """What the job does the moment it is submitted; $run is its run directory."""
        find = 'for word in "$@"; do case $word in --chdir=*) run=${word#--chdir=} ;; esac; done\n'
        (self.directory / "sbatch.hook").write_text(find + shell)

    def hangs(self, program: str) -> None:
        (self.directory / f"{program}.pause").write_text("30")

    def says(self, program: str, output: str, *, error: str = "", status: int = 0) -> None:
        (self.directory / f"{program}.out").write_text(output)
        (self.directory / f"{program}.err").write_text(error)
        (self.directory / f"{program}.rc").write_text(str(status))

    def calls(self, program: str | None = None) -> list[str]:
        """The command lines so far, oldest first."""
        try:
            lines = (self.directory / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if program is None or line.split()[0] == program]

    def environment_of(self, program: str) -> dict[str, str]:
        """The variables the program saw when it was last called."""
        lines = (self.directory / f"{program}.env").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)
