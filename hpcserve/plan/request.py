"""What a plan is made from: files already read, flags already parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config.model import ModelSpec
from ..config.site import Site
from .plan import BatchPlan

if TYPE_CHECKING:
    from ..config.model_facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The whole input of `make_plan`: nothing else is looked at."""

    model: ModelSpec
    site: Site
    facts: ModelFacts | None = None
    """From the model's own config.json; None when it can't be read from here."""
    nodes: int | None = None
    prefill: int | None = None
    """`--prefill`: nodes of the prefill pool."""
    decode: int | None = None
    """`--decode`: nodes of the decode pool."""
    walltime: int | None = None
    """Seconds."""
    name: str | None = None
    account: str | None = None
    partition: str | None = None
    batch: BatchPlan | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    """Dotted key of model.yaml (`prefill.nodes`) or, behind `site.`, of the site config
    (`site.slurm.partition`) -> where it was set: `model.yaml:4`, `--set`, `HPCSERVE_SITE`."""
