"""What keeps two test processes side by side fast: one OpenMP thread each, and exporting children that stay."""

import os
from collections.abc import Iterator
from typing import ClassVar

import pytest

from doconv_convert.artifacts.export import child_process

# Before torch is imported: with more, the processes wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run on the CPU, in its interpreter, but for the tests that have a GPU; also before torch."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


OwnChild = child_process.Child


class PooledChild:
    """In an exporting child's place: real children, kept for the next test, as the start of one costs seconds."""

    reuse = False
    idle: ClassVar[list[OwnChild]] = []

    def __init__(self, *, reuse: bool = False) -> None:
        self._child = self.idle.pop() if self.idle else OwnChild(reuse=True)
        self._done = True

    def export(self, job: child_process.ExportJob) -> object:
        self._done = False
        report = self._child.export(job)
        self._done = True
        return report

    def close(self) -> None:
        if not self._done:
            self._child.close()  # in the middle of a job, or after one that failed
        self.idle.append(self._child)


@pytest.fixture(scope="session", autouse=True)
def pooled_children() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child_process, "Child", PooledChild)
        yield
    for child in PooledChild.idle:
        child.close()


@pytest.fixture
def own_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the children themselves: a fresh process each."""
    monkeypatch.setattr(child_process, "Child", OwnChild)


@pytest.fixture(scope="module", params=["product.c", "torch's operations"])
def both_arithmetics(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of the module twice: with and without the compiled product."""
    from doconv_convert.nn import native  # torch, after OMP_NUM_THREADS

    with pytest.MonkeyPatch.context() as patch:
        if request.param != "product.c":
            patch.setattr(native, "LIBRARIES", {})
        elif not native.LIBRARIES:
            pytest.skip("product.c was not compiled")
        yield
