"""Compiles the pump when the package is built or installed, also with `--editable`.

Without a C compiler, or with HPCSERVE_COMPILE=0, the package is pure Python: the router then carries all
streams by way of its event loop, which costs more CPU time, and says so when it starts
(docs/adr/0010-callbacks-and-a-pump.md).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULE = "hpcserve.router.stream.pump"


class CompilePump(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or os.environ.get("HPCSERVE_COMPILE") == "0":
            return
        try:
            built = compile_pump(Path(self.root))
        except Exception as error:
            # Whatever a missing or strange compiler raises: the package works without.
            self.app.display_warning(f"{MODULE} was not compiled, and the router will do without: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(str(built.relative_to(self.root)))


def compile_pump(root: Path) -> Path:
    """The compiled module, next to its source. Raises what the compilers raise."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    source = root.joinpath(*MODULE.split(".")).with_suffix(".pyx")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory(prefix="hpcserve-build-") as temp:
        extension = Extension(
            MODULE, [str(source)], define_macros=[("PUMP_SOURCE", f'"{digest}"')], extra_compile_args=["-O2"]
        )
        modules = cythonize([extension], build_dir=temp, quiet=True)
        command = Distribution({"name": "hpcserve", "ext_modules": modules}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = f"{temp}/lib", f"{temp}/temp"
        command.ensure_finalized()
        command.run()
        [output] = command.get_outputs()
        target = source.parent / Path(output).name
        # Never in place: a router that runs has the old one mapped.
        fresh = target.with_name(f".{target.name}.new")
        shutil.copyfile(output, fresh)
        fresh.replace(target)
    return target


if __name__ == "__main__":
    print(compile_pump(Path(__file__).resolve().parent), file=sys.stderr)
