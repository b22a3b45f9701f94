"""Compiles doconv_convert/nn/product.c into the wheel, or beside its source for an editable install.

Without a C compiler, and anywhere but on x86-64 Linux, the package is the same without it: torch's operations do that
arithmetic then, in about three times the time (docs/benchmarks.md).
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCE = Path("doconv_convert/nn/product.c")
# As torch names what a processor can do (torch.backends.cpu.get_cpu_capability), lower case.
PROCESSORS = {
    "avx512": ("-march=x86-64-v4", "-DWIDTH=64"),
    "avx2": ("-march=x86-64-v3", "-DWIDTH=32"),
}


class CompileProduct(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        root = Path(self.root)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        for processor, options in PROCESSORS.items():
            for real in ("float", "double"):
                library = SOURCE.with_name(f"_product_{processor}_{real}.so")
                command = [*compiler, "-O3", "-shared", "-fPIC", "-fopenmp", *options, f"-DREAL={real}"]
                try:
                    subprocess.run([*command, "-o", library, SOURCE], cwd=root, check=True, capture_output=True)
                except (OSError, subprocess.CalledProcessError) as error:
                    said = (getattr(error, "stderr", b"") or b"").decode(errors="replace")
                    self.app.display_warning(f"product.c is left out, training takes longer: {error} {said}")
                    return
                build_data["artifacts"].append(f"/{library}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(platform_tags())}"
