from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcserve import errors
from hpcserve.cli.main import COMMANDS, main

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_reference_of_commands_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generate_cli.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_names_every_exit_status() -> None:
    text = (DOCS / "reference" / "cli.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    statuses = {kind.exit_code for kind in kinds if issubclass(kind, errors.HpcserveError)}
    assert all(f"| {status} |" in text for status in statuses | {0, 130})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_module_that_says_what_it_does(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"usage: hpcserve {command}" in capsys.readouterr().out
    module = command.replace("-", "_").replace(" ", "_")
    assert importlib.import_module(f"hpcserve.cli.{module}").__doc__


def test_the_overview_fits_a_terminal_and_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert all(any(line.strip().startswith(command) for line in lines) for command in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["launch", "--help"]], ids=" ".join)
def test_a_closed_pipe_ends_quietly(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hpcserve", *words], stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (130, b"")
