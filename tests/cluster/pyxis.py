"""The stand-in for pyxis (pyxis_stub.c), compiled and put into Slurm's plug-in stack for a while."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import paths

_SOURCE = Path(__file__).with_name("pyxis_stub.c")
_LIBRARY = paths.RUN / "pyxis_stub.so"
_HOOKS = paths.RUN / "enroot-hooks.d"
_CONF = paths.PLUGINS / "pyxis.conf"


@contextmanager
def pyxis(*, pmi_hook: bool) -> Iterator[None]:
    """srun has pyxis's options; with `pmi_hook` the administrator has enabled enroot's 50-slurm-pmi.sh."""
    flags = ["-std=gnu11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, f"-o{_LIBRARY}", str(_SOURCE)], check=True)
    _HOOKS.mkdir(exist_ok=True)
    hook = _HOOKS / "50-slurm-pmi.sh"
    hook.touch() if pmi_hook else hook.unlink(missing_ok=True)
    _CONF.write_text(f"required {_LIBRARY} hooks={_HOOKS}\n")
    for path, mode in ((_LIBRARY, 0o755), (_HOOKS, 0o755), (_CONF, 0o644)):
        path.chmod(mode)
    try:
        yield
    finally:
        _CONF.unlink()
