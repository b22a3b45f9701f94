"""`rehearse` on many sources: what is left to do, the results one by one, and their sum."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doconv_convert.artifacts.sources.zoos import expand
from doconv_convert.errors import DoconvError
from doconv_convert.files import refused
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.workflows.rehearsal.result import CANNOT_EXPORT

Result = dict[str, Any]


@dataclass(frozen=True)
class RehearseRequest:
    """What `rehearse` is asked for: the command line's options. `jobs` processes side by side; `resume` is a file of
    earlier results (JSON lines), to which each new one is added."""

    sources: Sequence[str]
    jobs: int = 1
    resume: Path | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    input_shapes: Sequence[str] = ()
    seed: int = 0
    export: bool = True
    merge: Merge = "none"

    @property
    def settings(self) -> dict[str, Any]:
        """`rehearse`'s arguments, as each result names them."""
        return {
            "model_args": dict(self.model_args),
            "seed": self.seed,
            "export": self.export,
            "input_shapes": list(self.input_shapes),
            **({} if self.merge == "none" else {"merge": self.merge}),
        }


@dataclass(frozen=True)
class RehearseResult:
    """The results, as JSON, in the order of the sources."""

    models: tuple[Result, ...]

    def count(self, status: str) -> int:
        return sum(model["status"] == status for model in self.models)

    @property
    def passed(self) -> int:
        return self.count("passed")

    @property
    def unexportable(self) -> int:
        """How many originals cannot be exported, which is no fault of their conversion."""
        return self.count(CANNOT_EXPORT)

    @property
    def failed(self) -> int:
        return len(self.models) - self.passed - self.unexportable

    def to_json(self) -> dict[str, Any]:
        return {"models": list(self.models)}


@dataclass(frozen=True)
class Rehearsals:
    """The sources asked for, what is `known` of them from an earlier run, and those still to do."""

    request: RehearseRequest
    wanted: tuple[str, ...]
    known: dict[str, Result]
    todo: tuple[str, ...]

    @classmethod
    def of(cls, request: RehearseRequest) -> Rehearsals:
        """Raises UsageError for globs that match nothing, DoconvError for a file that holds no results."""
        wanted = tuple(expand(request.sources))
        if request.resume is not None:
            _make_writable(request.resume)
        known = _read(request)
        return cls(request, wanted, known, tuple(text for text in wanted if text not in known))

    def run(self) -> Iterator[Result]:
        """Rehearse what is left; each result as it comes."""
        for result in _results(self.todo, self.request):
            self.known[result["source"]] = result
            if self.request.resume is not None:
                with refused(self.request.resume), self.request.resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            yield result

    def result(self) -> RehearseResult:
        return RehearseResult(tuple(self.known[text] for text in self.wanted))


def _results(todo: Sequence[str], request: RehearseRequest) -> Iterator[Result]:
    from doconv_convert.artifacts.export.child_process import waiting_children
    from doconv_convert.workflows.rehearsal.rehearse import rehearse
    from doconv_convert.workflows.rehearsal.workers import rehearse_side_by_side

    children = 2 if request.export else 0
    if request.jobs > 1 and len(todo) > 1:
        yield from rehearse_side_by_side(todo, request.settings, request.jobs, children)
        return
    with waiting_children(children if todo else 0, reuse=True) as waiting:
        for text in todo:
            yield rehearse(text, **request.settings, waiting=waiting).to_json()


def _make_writable(resume: Path) -> None:
    """Makes the file where there is none, and whole where its last line was cut off: by a kill, or a full disk.

    Raises DoconvError where it cannot be written.
    """
    with refused(resume), resume.open("ab+") as file:
        file.seek(0)
        content = file.read()
        last = content.rpartition(b"\n")[2]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:  # that model is rehearsed again
            file.truncate(len(content) - len(last))
        else:
            file.write(b"\n")


def _read(request: RehearseRequest) -> dict[str, Result]:
    """The results by their sources: those of the same settings, with the export where it is asked for."""
    resume, settings = request.resume, request.settings
    if resume is None:
        return {}
    try:
        results = [json.loads(line) for line in resume.read_text(encoding="utf-8").split("\n") if line.strip()]
        serving = [settings, {**settings, "export": True}]
        return {result["source"]: result for result in results if result["settings"] in serving}
    except (ValueError, KeyError, TypeError) as error:
        raise DoconvError(f"'{resume}' is not a file of rehearsal results ({error}); name another one.") from error
