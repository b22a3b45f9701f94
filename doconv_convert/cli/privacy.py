"""Where files lie is a matter of the machine: what is written for others names them without their folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Folders:
    """Texts of paths, the longest first, and what stands in their place."""

    replaced: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, files: Iterable[object]) -> Folders:
        """The folders of `files`, as far as they were named by more than a path below the present folder: paths, and
        sources such as '/home/me/net.py:factory'. None stands for a file that was not named."""
        named = [text for file in files if file is not None for text in (str(file), str(file).rpartition(":")[0])]
        paths = {text: Path(text) for text in named if Path(text).name}
        paths = {text: path for text, path in paths.items() if path.is_absolute() or ".." in path.parts}
        found = {text: path.name for text, path in paths.items()}
        for folder in (*(path.parent for path in paths.values()), *_own_folders()):
            # '/model/' alone may as well be the beginning of a node's name
            if len(folder.parts) > 2:
                found[f"{folder}{os.sep}"] = ""
        return cls(tuple(sorted(found.items(), key=lambda pair: len(pair[0]), reverse=True)))

    def left_out(self, value: Any) -> Any:
        """A text, or a document of texts, without them."""
        if isinstance(value, str):
            for path, name in self.replaced:
                value = value.replace(path, name)
            return value
        if isinstance(value, Mapping):
            return {self.left_out(key): self.left_out(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.left_out(one) for one in value]
        return value


def _own_folders() -> Iterator[Path]:
    """The present folder and the user's, where there are any."""
    for find in (Path.cwd, Path.home):
        with suppress(OSError, RuntimeError):
            yield find()
