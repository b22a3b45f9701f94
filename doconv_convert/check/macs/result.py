"""What a count of multiply-accumulates (MACs) is made of."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


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
    what was assumed where the graph does not say what will run.

    `claimed` are the values whose sizes some product depends on and only the file states: no operator confirms them.
    `inputs` are the shapes that the run was counted for (None: the file does not say).
    """

    nodes: tuple[NodeMacs, ...] = ()
    uncounted: dict[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = field(default=(), compare=False)
    claimed: tuple[str, ...] = field(default=(), compare=False)
    inputs: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict, compare=False)

    @property
    def total(self) -> int:
        """The MACs of all counted nodes; complete only if `uncounted` is empty."""
        return sum(node.macs for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "nodes": [vars(node) for node in self.nodes]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MacCount":
        inputs = {name: None if shape is None else tuple(shape) for name, shape in data["inputs"].items()}
        nodes = tuple(NodeMacs(**node) for node in data["nodes"])
        return cls(nodes, dict(data["uncounted"]), tuple(data["assumed"]), tuple(data["claimed"]), inputs)


def merged(counts: Iterable[MacCount]) -> MacCount:
    nodes: list[NodeMacs] = []
    uncounted: Counter[str] = Counter()
    assumed: list[str] = []
    claimed: dict[str, None] = {}
    for count in counts:
        nodes += count.nodes
        uncounted.update(count.uncounted)
        assumed += count.assumed
        claimed.update(dict.fromkeys(count.claimed))
    return MacCount(tuple(nodes), dict(uncounted), tuple(assumed), tuple(claimed))


def repeated(count: MacCount, prefix: str, times: int) -> MacCount:
    """The count of a subgraph that runs `times` times, with its nodes named below `prefix`."""
    nodes = tuple(replace(node, name=f"{prefix}/{node.name}", macs=node.macs * times) for node in count.nodes)
    return replace(count, nodes=nodes)


@dataclass(frozen=True)
class RegionLeft:
    """Nodes that are one convolution, by their names, and what they multiply more than it: MACs of one sample."""

    nodes: tuple[str, ...]
    convolutions: int
    macs: int
    wasted: int


def wasted_macs(regions: Iterable[RegionLeft]) -> int:
    return sum(region.wasted for region in regions)
