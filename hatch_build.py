"""Compiles doconv_convert/nn/product.c into the wheel, or beside its source for an editable install.

Without a C compiler, and anywhere but on x86-64 Linux, the package is the same without it: torch's operations do that
arithmetic then, and training takes longer (docs/benchmarks.md).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("doconv_convert/nn/product.c")
LIBRARIES = SOURCE.with_name("libraries")
# As torch names what a processor can do (torch.backends.cpu.get_cpu_capability), lower case.
PROCESSORS = {
    "avx512": ("-march=x86-64-v4", "-DWIDTH=64"),
    "avx2": ("-march=x86-64-v3", "-DWIDTH=32"),
}


class CompileProduct(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return
        root = Path(self.root)
        self._folder = tempfile.TemporaryDirectory()  # lives as long as the build
        try:
            made = [compiled(root / SOURCE, self._folder.name, *each) for each in variants()]
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", b"") or b"").decode(errors="replace")
            self.app.display_warning(f"product.c is left out, training takes longer: {error} {said}")
            return
        if version == "editable":
            shutil.rmtree(root / LIBRARIES, ignore_errors=True)
            shutil.copytree(self._folder.name, root / LIBRARIES)
            return
        build_data["force_include"] |= {str(library): f"{LIBRARIES}/{library.name}" for library in made}
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def variants() -> list[tuple[str, str]]:
    return [(processor, real) for processor in PROCESSORS for real in ("float", "double")]


def compiled(source: Path, folder: str, processor: str, real: str) -> Path:
    """A library in `folder`, named as native.py looks for it."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    library = Path(folder) / f"product_{processor}_{real}_{digest}.so"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    options = "-O3", "-shared", "-fPIC", "-fopenmp", *PROCESSORS[processor], f"-DREAL={real}"
    subprocess.run([*compiler, *options, "-o", str(library), str(source)], check=True, capture_output=True)
    return library
