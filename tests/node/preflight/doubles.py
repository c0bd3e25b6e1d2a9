"""Packages named `nixl` that do what a broken one does. Written to a directory for PYTHONPATH."""

from __future__ import annotations

from pathlib import Path

_WORKS = '''
class nixl_agent_config:
    def __init__(self, **_):
        pass


class nixl_agent:
    """Says what it is told to say, and moves nothing."""

    def __init__(self, name, config):
        self.name, self.backends = name, {"UCX": 1}

    def register_memory(self, regions, kind):
        pass

    def get_agent_metadata(self):
        return self.name.encode()

    def add_remote_agent(self, metadata):
        return b"peer"

    def get_xfer_descs(self, descriptors, kind):
        return descriptors

    def initialize_xfer(self, operation, local, remote, agent):
        return object()

    def release_xfer_handle(self, handle):
        pass

    def transfer(self, handle):
        return "PROC"

    def check_xfer_state(self, handle):
        return "PROC"
'''
_BROKEN = {
    "missing": "raise ImportError('libucp.so.0: cannot open shared object file')",
    "no backend": _WORKS + "\n_init = nixl_agent.__init__\n"
    "def _without(self, name, config):\n    _init(self, name, config)\n    self.backends = {}\n"
    "nixl_agent.__init__ = _without\n",
    "dies in a transfer": _WORKS + "\nimport os, signal\n"
    "nixl_agent.transfer = lambda self, handle: os.kill(os.getpid(), signal.SIGSEGV)\n",
    "moves nothing": _WORKS + "\nnixl_agent.transfer = lambda self, handle: 'DONE'\n",
    "never ends": _WORKS,
}


def broken_nixl(root: Path, how: str) -> dict[str, str]:
    """The environment in which `import nixl` finds that one."""
    package = root / how.replace(" ", "-") / "nixl"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_api.py").write_text(_BROKEN[how])
    return {"PYTHONPATH": str(package.parent)}


def container_runtime(root: Path) -> Path:
    """Runs what is behind the image, `/i.sif`, with the package where it is bound, and stays its parent.

    Its calls are in `called` beside it.
    """
    program = root / "apptainer"
    program.write_text(
        f"""#!/bin/bash
echo "$*" >>{root}/called
echo 'WARNING: a runtime, or an image, may say something'
until [ "$1" = /i.sif ]; do
  case $1 in --bind=*:/opt/hpcserve-package/hpcserve:ro) package=${{1#--bind=}} ;; esac
  shift
done
shift
if [ "$PYTHONPATH" != /opt/hpcserve-package ]; then exit 9; fi
export PYTHONPATH=$(dirname -- "${{package%%:*}}")
"$@"
"""
    )
    program.chmod(0o700)
    return program
