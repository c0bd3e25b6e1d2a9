"""Compiles the router's hot paths when the package is built or installed, also with `--editable`.

Without a C compiler, or with HPCSERVE_COMPILE=0, the package is pure Python: the router then does the same
with more CPU time, and says so when it starts (docs/adr/0010-callbacks-and-a-pump.md).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODULES = (
    "hpcserve.http.head_cache",
    "hpcserve.router.express",
    "hpcserve.router.known",
    "hpcserve.router.kv.marks",
    "hpcserve.router.lane",
    "hpcserve.router.placement.lowest",
    "hpcserve.router.reading",
    "hpcserve.router.stream.answer",
    "hpcserve.router.stream.gate",
    "hpcserve.router.stream.pump",
    "hpcserve.router.stream.shapes",
)


class CompileModules(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or os.environ.get("HPCSERVE_COMPILE") == "0":
            return
        try:
            built = compile_modules(Path(self.root))
        except Exception as error:
            # Whatever a missing or strange compiler raises: the package works without.
            names = ", ".join(MODULES)
            self.app.display_warning(f"{names} were not compiled, and the router will do without: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in built]


def compile_modules(root: Path) -> list[Path]:
    """The compiled modules, next to their sources: all of them or none. Raises what the compilers raise."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    digest = _digest(root)
    with tempfile.TemporaryDirectory(prefix="hpcserve-build-") as temp:
        extensions = []
        for module in MODULES:
            source = root.joinpath(*module.split(".")).with_suffix(".pyx")
            macros = [("HPCSERVE_SOURCE", f'"{digest(source)}"')]
            path = str(source.relative_to(root))
            extensions.append(Extension(module, [path], define_macros=macros, extra_compile_args=["-O2"]))
        before = Path.cwd()
        os.chdir(root)  # declarations of other modules are looked for from here
        try:
            modules = cythonize(extensions, build_dir=temp, quiet=True)
            command = Distribution({"name": "hpcserve", "ext_modules": modules}).get_command_obj("build_ext")
            command.build_lib, command.build_temp = f"{temp}/lib", f"{temp}/temp"
            command.parallel = min(4, os.cpu_count() or 1)
            command.ensure_finalized()
            command.run()
        finally:
            os.chdir(before)
        targets = []
        for module, output in zip(MODULES, command.get_outputs(), strict=True):
            target = root.joinpath(*module.split(".")).with_name(Path(output).name)
            # Never in place: a router that runs has the old one mapped.
            fresh = target.with_name(f".{target.name}.new")
            shutil.copyfile(output, fresh)
            fresh.replace(target)
            targets.append(target)
    return targets


def _digest(root: Path) -> Any:
    """The router's own: it compares what was compiled with what lies there."""
    import importlib.util

    path = root / "hpcserve" / "http" / "compiled.py"
    spec = importlib.util.spec_from_file_location("compiled", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest


if __name__ == "__main__":
    print(*compile_modules(Path(__file__).resolve().parent), sep="\n", file=sys.stderr)
