"""Engines in a container of their own, started by an agent outside: `container.agent: outside`.

The image needs no hpcserve. What engines load from it (guards before their APIs, which use the standard
library alone) is bound into the image, and nothing else of the node's Python is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import EngineError
from ...plan.plan import Plan
from ...render.containers import (
    FOREIGN,
    LIBRARIES,
    NO_USER_SITE,
    PACKAGE_IN_IMAGE,
    apptainer_words,
    image_libraries,
)

APPTAINER_VARIABLE = "HPCSERVE_APPTAINER"
"""Apptainer's program, as the job script found it."""
_PACKAGE = Path(__file__).resolve().parents[2]


def engines_apart(plan: Plan) -> bool:
    """Do engines run in a container, and the agent outside?"""
    return plan.site.container.runtime == "apptainer" and plan.site.container.agent == "outside"


def contained_argv(
    plan: Plan, run_dir: Path, argv: Sequence[str], *, scratch: str, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """The engine's command inside. Raises EngineError when the job script has told no runtime."""
    try:
        runtime = environ[APPTAINER_VARIABLE]
    except KeyError:
        raise EngineError(
            f"{APPTAINER_VARIABLE} is not set, so there is no container for the engines",
            hint="start agents with the job script",
        ) from None
    # `$NAME` in them is for the shell of a job script, and there is none here.
    words = [os.path.expandvars(word) for word in apptainer_words(plan, run_dir)]
    own = [f"--bind={_PACKAGE}:{PACKAGE_IN_IMAGE}/{_PACKAGE.name}:ro", f"--pwd={scratch}"]
    return (runtime, "exec", *own, *words, *argv)


def contained_environment(
    plan: Plan, environment: Mapping[str, str], added: Mapping[str, str], *, outside: Mapping[str, str]
) -> dict[str, str]:
    """The engine's environment without what names the node's own libraries, unless site or engine set it.

    `outside`: the agent's own, whose LD_LIBRARY_PATH Apptainer itself may need. It never reaches the inside.
    """
    meant = {*plan.site.setup.env, *added}
    kept = {name: value for name, value in environment.items() if name not in FOREIGN or name in meant}
    kept.pop(APPTAINER_VARIABLE, None)
    kept.setdefault(NO_USER_SITE, "1")
    if LIBRARIES in kept:
        kept = {**image_libraries(kept.pop(LIBRARIES)), **kept}
    if LIBRARIES in outside:
        kept[LIBRARIES] = outside[LIBRARIES]
    further = kept.get("PYTHONPATH")
    kept["PYTHONPATH"] = f"{PACKAGE_IN_IMAGE}:{further}" if further else PACKAGE_IN_IMAGE
    return kept
