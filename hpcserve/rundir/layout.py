"""Names of the files in a run directory.

    run.json          identity: name, site, job id, when and by whom submitted
    model.yaml        the file as given
    plan.json         the Plan
    job.sh            the job script
    engines.sh        every engine's command, for people; agents work from plan.json
    secrets/api-key   what clients send (0600)
    secrets/job-key   what agents, controller, router and engines send each other (0600)
    ranks/RANK.json   "this rank's process is alive", written before the rendezvous waits
    roster.json       what the rendezvous found: one entry per rank
    fabric.json       ports, NVLink and transport variables of each replica, with reasons, for people
    staged.json       where the engines load a staged model from, or that it is the shared path
    preflight.json    what NIXL moved between prefill and decode nodes before any model was loaded
    head.json         the controller's address and the head node's process
    endpoint.json     the OpenAI endpoint, once READY
    events.jsonl      what happened, one line each; written by the head node only
    stop              exists once somebody asked the run to stop
    batches/          files and batches of the Batch API, see batch/api/layout.py
    logs/             job.log, rendezvous-RANK.log, preflight-RANK.log, staging-RANK.log, agent-RANK.log,
                      head.log, router.log, batches.log, REPLICA.NODE.log

Beside the run directories, and outliving them (no run's name begins with a dot):

    .keys/ID.json     one key of a person who shares the endpoints, hashed
    .usage/RUN.jsonl  what was used in one run, by hour and key
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KEYS = ".keys"
USAGE = ".usage"


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths below one run directory."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def model(self) -> Path:
        return self.path / "model.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets"

    @property
    def api_key(self) -> Path:
        return self.secrets / "api-key"

    @property
    def job_key(self) -> Path:
        return self.secrets / "job-key"

    @property
    def keys(self) -> Path:
        """Of all runs of this runs directory."""
        return self.path.parent / KEYS

    @property
    def usage(self) -> Path:
        """Of all runs of this runs directory."""
        return self.path.parent / USAGE

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def roster(self) -> Path:
        return self.path / "roster.json"

    @property
    def fabric(self) -> Path:
        return self.path / "fabric.json"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight.json"

    @property
    def staged(self) -> Path:
        return self.path / "staged.json"

    @property
    def head(self) -> Path:
        return self.path / "head.json"

    @property
    def endpoint(self) -> Path:
        return self.path / "endpoint.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def batches(self) -> Path:
        return self.path / "batches"

    @property
    def batch_api(self) -> Path:
        """Where the process of the Batch API can be reached, and what the router must say to it (0600)."""
        return self.batches / "api.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def rank(self, rank: int) -> Path:
        return self.ranks / f"{rank}.json"
