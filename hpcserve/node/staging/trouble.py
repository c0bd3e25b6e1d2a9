"""Why a model is not staged: mostly the run can go on without."""

from __future__ import annotations

from ...errors import JobError


class NotStaged(JobError):
    """This node, or the way to the next one, can't; all nodes load from the shared path then."""


class DiskFull(NotStaged):
    """Of a node; half a model must not keep others' jobs from writing there."""


class LostNeighbour(NotStaged):
    """The other end of a lane is gone: most often it has a reason of its own, and that is the one to tell."""


class LostHead(JobError):
    """Nothing comes from the head node any more: it died, or the way to it is cut."""
