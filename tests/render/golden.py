"""The job scripts under sbatch/ that are worth reading: `python -m tests.render.golden --write`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from hpcserve.config.load import load_model
from hpcserve.config.model import ModelSpec, RoleSpec, WorkloadSpec
from hpcserve.config.model_facts import stated_facts
from hpcserve.config.sites import find_site
from hpcserve.plan.plan import BatchPlan, Plan
from hpcserve.render.engine import render_commands
from hpcserve.render.script import render_script
from hpcserve.render.summary import columns, plan_table

from .cases import PYTHON, contained, mixed, pair, plan, shipped

DIRECTORY = Path(__file__).parents[2] / "sbatch"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def plans() -> dict[str, Plan]:
    """File name without suffix -> what it shows."""
    long_prompts = WorkloadSpec(input_tokens=6000, output_tokens=500)
    wide = RoleSpec(tensor_parallel=8)
    return {
        "dgx-h100-8-pyxis": plan(
            contained(shipped("dgx-h100"), "pyxis"),
            model=pair(workload=long_prompts, walltime=4 * 3600),
            nodes=8,
        ),
        "dgx-h100-2-apptainer": plan(contained(shipped("dgx-h100"), "apptainer"), model=pair(), nodes=2),
        "gb200-nvl72-18-pyxis": plan(
            contained(shipped("gb200-nvl72"), "pyxis"),
            model=ModelSpec(
                model="/models/DeepSeek-R1",
                prefill=replace(wide, nodes=6),
                decode=replace(wide, data_parallel=1, expert_parallel=True, nodes=12),
                stage=True,
            ),
            nodes=18,
        ),
        "generic-slurm-2": plan(shipped("generic-slurm"), model=pair(), nodes=2),
        "generic-slurm-2-batch": replace(
            plan(shipped("generic-slurm"), model=pair(), nodes=2),
            batch=BatchPlan(output="/scratch/alice/answers", max_error_rate=0.5),
        ),
        "dgx-h100-2-l40s-4-het": mixed(),
        "local-2": plan(shipped("local"), model=pair(engine="fake"), nodes=2),
    }


RECIPES = {
    "deepseek-r1-8": ("dgx-h100", "DeepSeek-R1"),
    "deepseek-r1-nvl72": ("gb200-nvl72", "DeepSeek-R1"),
    "llama-3.1-8b-1": ("dgx-h100", "Llama-3.1-8B-Instruct"),
    "llama-3.3-70b-2": ("dgx-h100", "Llama-3.3-70B-Instruct"),
}
"""Files of docs/examples/ -> the site they are shown on, and the model's facts below models/."""


def recipe(name: str) -> Plan:
    """What `hpcserve launch --dry-run` plans for a model that lies in /models."""
    site_name, facts = RECIPES[name]
    model = load_model(EXAMPLES / f"{name}.yaml")
    stated = json.loads((Path(__file__).parent / "models" / f"{facts}.json").read_text())
    site = contained(shipped(site_name), "pyxis")
    own = find_site(site_name, environ={"PATH": ""}, hostname="nowhere").origins
    origins = {**model.origins, **{f"site.{key}": where for key, where in own.items()}}
    return plan(
        site,
        model=model.value,
        facts=stated_facts(stated["config"], path=model.value.model, weight_bytes=stated["weight_bytes"]),
        origins={key: where.rsplit("/", 1)[-1] for key, where in origins.items()},
    )


def explained(what: Plan) -> str:
    """What `hpcserve launch --dry-run` and `hpcserve explain` print about a plan."""
    rows = [(note.key, note.value, note.origin, note.where) for note in what.explanations]
    table = columns(("KEY", "VALUE", "ORIGIN", "WHERE"), iter(rows))
    return "\n".join([plan_table(what), "", *table, ""])


def files() -> dict[str, str]:
    """Name below sbatch/ -> text."""
    texts = {}
    for name in RECIPES:
        what = recipe(name)
        texts[f"{name}.plan.txt"] = explained(what)
        texts[f"{name}.sh"] = render_script(what, Path("/scratch/alice/hpcserve") / what.name, python=PYTHON)
        texts[f"{name}.engines.sh"] = render_commands(what, python=PYTHON)
    for name, what in plans().items():
        run_dir = Path("/scratch/alice/hpcserve") / what.name
        texts[f"{name}.sh"] = render_script(what, run_dir, python=PYTHON)
    texts["dgx-h100-8-pyxis.engines.sh"] = render_commands(plans()["dgx-h100-8-pyxis"], python=PYTHON)
    return texts


def main(argv: list[str]) -> int:
    if argv != ["--write"]:
        print("usage: python -m tests.render.golden --write", file=sys.stderr)
        return 2
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in files().items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")
        print(DIRECTORY / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
