"""The package's rooms, from its imports alone: who imports whom, circles, and imports that lead upward.

    python docs/make/rooms.py [FOLDER]

FOLDER holds the package, by default this project. Every import counts: in a function and under TYPE_CHECKING too. In
each folder its files and folders are the rooms; a floor is one more than the highest floor below it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "doconv_convert"
# From the ground up: a room imports from rooms before it. The files of the top folder not named here are the ground.
ORDER = ("nn", "rewrite", "artifacts", "check", "workflows", "cli", "__main__")


class Import(NamedTuple):
    """One module of the package imports another, both without the package's name; `imported` "" is the package."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported or PACKAGE}"


Rooms = dict[str, dict[str, set[str]]]  # folder: its files and folders, each with those of the same folder it imports


def imports_of(root: Path) -> list[Import]:
    """Every import within the package. The package's own file is left out: its names lead everywhere, on first use."""
    names = {_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    return [
        Import(importer, imported, line)
        for importer, path in names.items()
        if importer
        for imported, line in _imported(ast.parse(path.read_text(), str(path)), names)
        if imported != importer
    ]


def upward(imports: list[Import]) -> list[Import]:
    """Imports of a room further up, and of the package's own names, which come from every room."""
    return [one for one in imports if not one.imported or _floor(one.imported) > _floor(one.importer)]


def rooms_of(imports: list[Import]) -> Rooms:
    rooms: Rooms = {}
    for importer, imported, _ in imports:
        ours, theirs = importer.split("."), imported.split(".")
        depth = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if imported and depth is not None:
            folder = rooms.setdefault(".".join(ours[:depth]), {})
            folder.setdefault(ours[depth], set()).add(theirs[depth])
            folder.setdefault(theirs[depth], set())
    return rooms


def circles(rooms: Rooms) -> list[str]:
    """One circle a folder, where it has any."""
    found = []
    for folder, inside in sorted(rooms.items()):
        try:
            TopologicalSorter(inside).prepare()
        except CycleError as error:
            found.append(f"{folder or PACKAGE}: {' <- '.join(error.args[1])}")
    return found


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, names: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            asked = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        else:
            continue
        for name in asked:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                inside = name.removeprefix(PACKAGE).lstrip(".")
                yield inside if inside in names else inside.rpartition(".")[0], node.lineno


def _floor(module: str) -> int:
    room = module.partition(".")[0]
    return ORDER.index(room) + 1 if room in ORDER else 0


def _floors(inside: Mapping[str, set[str]]) -> dict[str, int]:
    floors: dict[str, int] = {}
    for room in TopologicalSorter(inside).static_order():
        floors[room] = 1 + max((floors[below] for below in inside[room]), default=0)
    return floors


def main() -> None:
    imports = imports_of(Path(sys.argv[1]) if sys.argv[1:] else ROOT)
    rooms = rooms_of(imports)
    around = circles(rooms)
    for folder, inside in sorted(rooms.items()):
        arrows = sum(map(len, inside.values()))
        head = f"{f'{PACKAGE}.{folder}'.rstrip('.')}: {len(inside)} rooms, {arrows} arrows"
        if any(circle.startswith(f"{folder or PACKAGE}: ") for circle in around):
            print(f"{head}, a circle")
            continue
        floors = _floors(inside)
        print(f"{head}, {max(floors.values())} floors")
        for floor in range(1, max(floors.values()) + 1):
            print(f"  {floor}: {' '.join(sorted(room for room in inside if floors[room] == floor))}")
    lines_up = [str(one) for one in upward(imports)]
    print("\n".join([f"circles: {len(around)}", *around, f"upward imports: {len(lines_up)}", *lines_up]))
    raise SystemExit(1 if around or lines_up else 0)


if __name__ == "__main__":
    main()
