"""What every test has: no network; and what keeps two test processes side by side fast: one OpenMP thread each, and
exporting children that stay."""

import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from support_sockets import Loopback, attempts, forbid_sockets

from doconv_convert.artifacts.export import child_process

# Before torch is imported: with more, the processes wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run on the CPU, in its interpreter, but for the tests that have a GPU; also before torch."""
    if config.option.markexpr == "gpu":
        return  # of several GPUs, which talk to each other
    os.environ.setdefault("TRITON_INTERPRET", "1")
    workers = getattr(config.option, "numprocesses", 0) and not hasattr(config, "workerinput")
    if not workers:  # the process that starts them runs no test, and they could have no thread without the filter
        config.stash[LOOPBACK], config.stash[SOCKETS] = forbid_sockets()


LOOPBACK, SOCKETS = pytest.StashKey[Loopback](), pytest.StashKey[str]()


def pytest_report_header(config: pytest.Config) -> str:
    return f"sockets: {config.stash.get(SOCKETS, 'left to the workers')}"


@pytest.fixture(scope="session")
def loopback(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls what needs the loopback device: `loopback(function, *arguments)`."""
    return request.config.stash.get(LOOPBACK, lambda call, *arguments, **options: call(*arguments, **options))


@pytest.fixture(autouse=True)
def no_swallowed_attempt() -> Iterator[None]:
    """A test whose code tried for the network and went on without has failed."""
    attempts.clear()
    yield
    assert attempts == []


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
