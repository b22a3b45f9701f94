"""What a count of multiply-accumulates (MACs) is made of."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class NodeMacs:
    """One multiplying node: its MACs, and the elements of the weight and bias initializers it reads.

    `name` is the node's own, or its first output where it has none; in a subgraph it follows the names of the
    nodes around it.
    """

    name: str
    op: str
    output: str
    macs: int
    parameters: int


@dataclass(frozen=True)
class MacCount:
    """The multiplying nodes in the graph's order, the number of nodes left uncounted, by operator, and in words
    what was assumed where the graph does not say what will run."""

    nodes: tuple[NodeMacs, ...] = ()
    uncounted: dict[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = field(default=(), compare=False)

    @property
    def total(self) -> int:
        """The MACs of all counted nodes; complete only if `uncounted` is empty."""
        return sum(node.macs for node in self.nodes)


def merged(counts: Iterable[MacCount]) -> MacCount:
    nodes: list[NodeMacs] = []
    uncounted: Counter[str] = Counter()
    assumed: list[str] = []
    for count in counts:
        nodes += count.nodes
        uncounted.update(count.uncounted)
        assumed += count.assumed
    return MacCount(tuple(nodes), dict(uncounted), tuple(assumed))


def repeated(count: MacCount, prefix: str, times: int) -> MacCount:
    """The count of a subgraph that runs `times` times, with its nodes named below `prefix`."""
    nodes = (replace(node, name=f"{prefix}/{node.name}", macs=node.macs * times) for node in count.nodes)
    return MacCount(tuple(nodes), count.uncounted, count.assumed)
