"""What `sbatch` says when it refuses a job, and what to do about it.

Texts: slurm/src/common/slurm_errno.c, the same from 20.11 to 25.11 but for the ones marked.
"""

from __future__ import annotations

import re

_REFUSALS: tuple[tuple[str, str], ...] = (
    (
        r"[Ii]nvalid account or account/partition combination",
        "name an account you belong to with --account (`sacctmgr show assoc user=$USER`), "
        "and a partition it may use with --partition",
    ),
    (
        r"[Ii]nvalid partition|partition .* (does not exist|unknown)",
        "list the partitions with `sinfo -s` and choose one with --partition",
    ),
    (
        r"[Ii]nvalid qos|QOS .* not (valid|permitted)",
        "change `slurm.qos` of the site, or --set "
        "site.slurm.qos; `sacctmgr show assoc user=$USER format=account,qos` lists yours",
    ),
    (
        r"QOSMax\w*Wall|time limit (is )?invalid|exceeds .*time limit|[Rr]equested time limit",
        "ask for less with --walltime; `sinfo -o '%P %l'` shows each partition's limit",
    ),
    (
        r"QOSMaxSubmitJob|AssocMaxSubmitJob|[Jj]ob violates accounting/QOS policy",
        "you have reached a limit of your account or QOS: end or wait for other jobs, or ask for "
        "fewer --nodes and a shorter --walltime",
    ),
    (
        r"[Nn]ode count specification invalid|[Tt]oo many nodes|More processors requested",
        "ask for fewer --nodes; `sinfo -o '%P %D'` shows how many each partition has",
    ),
    (
        r"[Rr]equested node configuration is not available",
        "no node of the partition has these GPUs, CPUs and memory: compare the site's `node` and "
        "`slurm` sections with `sinfo -o '%P %c %m %G'`",
    ),
    (
        r"[Ii]nvalid (generic resource|GRES|gres)|[Ii]nvalid Trackable RESource",
        "this cluster asks for GPUs in another way: set `slurm.gpu_request` (and `gpu_type`) of the "
        "site; `sinfo -o '%P %G'` shows its names",
    ),
    (r"[Ii]nvalid feature", "change `slurm.constraint` of the site; `sinfo -o '%P %f'` lists the features"),
    (
        r"[Rr]equested reservation is invalid|reservation .*(invalid|denied)",
        "change `slurm.reservation` of the site; `scontrol show reservation` lists them",
    ),
    (
        r"[Mm]emory specification can not be satisfied",
        "lower `slurm.memory` of the site, or set it to `0` for all of a node's memory",
    ),
    (
        r"unrecognized option|[Ii]nvalid option|unknown option",
        "this Slurm does not know an option of the script: look at `slurm.extra` and `slurm.segment` "
        "of the site",
    ),
    (
        r"[Aa]ccess/permission denied|not permitted|[Uu]ser not allowed",
        "you may not use this partition or account: ask the site, or choose with --partition and --account",
    ),
    (r"submit rate|Job dependency problem|[Jj]ob submission rate", "wait a minute and launch again"),
    (
        r"[Uu]nable to contact slurm controller|[Ss]ocket timed out|Connection refused|"
        r"Transport endpoint|slurmctld.*down|[Zz]ero Bytes were transmitted",
        "Slurm's controller does not answer: `scontrol ping` shows its state; try again later",
    ),
    (
        r"Invalid user|authentication|[Mm]unge|credential",
        "this host can't authenticate to Slurm: launch from a login node of the cluster",
    ),
)

_DOWN = re.compile(
    r"[Uu]nable to contact slurm controller|[Ss]ocket timed out|Connection (refused|timed out|reset)|"
    r"[Zz]ero Bytes were transmitted|Transport endpoint|[Uu]nable to establish control.*connection|"
    r"slurm_persist_conn|Unexpected message received|[Cc]ommunication connection failure"
)


def hint_for(text: str) -> str | None:
    """What to do about a refusal; None when it is not a known one."""
    return next((hint for pattern, hint in _REFUSALS if re.search(pattern, text)), None)


def is_outage(text: str) -> bool:
    """True when the controller did not answer, so that asking again later makes sense."""
    return bool(_DOWN.search(text))


def sentence(stderr: str) -> str:
    """The part of sbatch's text that says why, without its prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or "it printed nothing"
