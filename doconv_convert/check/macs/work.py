"""How much work one count may be: a file of a few bytes can ask for any amount."""

from dataclasses import dataclass, field

from doconv_convert.check.macs.result import MacCount

# Exported networks have some 10,000 nodes at most, and a few thousand multiplying ones.
MOST_NODES = 500_000
MOST_PRODUCTS = 100_000
# of the names of all products
MOST_CHARACTERS = 1 << 24
# The largest networks take 1e16 MACs a sample; no machine runs so many.
MOST_MACS = 10**30


class CannotCountError(Exception):
    """Why a model cannot be counted."""


@dataclass
class Work:
    """What a count has done so far. Raises CannotCountError where it becomes more than any network needs."""

    nodes: int = 0
    products: int = 0
    characters: int = 0
    active: list[tuple[str, str, str]] = field(default_factory=list)
    """The functions that are being called now, from the outermost to the innermost."""

    def visit(self) -> None:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise CannotCountError(f"with its functions and subgraphs it has more than {MOST_NODES:,} nodes")

    def keep(self, count: MacCount) -> MacCount:
        """Of products that are listed once more, below a subgraph's or function's name."""
        self.products += len(count.nodes)
        self.characters += sum(len(node.name) for node in count.nodes)
        if self.products > MOST_PRODUCTS:
            raise CannotCountError(f"with its functions and subgraphs it lists more than {MOST_PRODUCTS:,} products")
        if self.characters > MOST_CHARACTERS:
            raise CannotCountError(f"the names of its nodes have more than {MOST_CHARACTERS:,} characters")
        if any(node.macs > MOST_MACS for node in count.nodes):
            raise CannotCountError("a node multiplies more than 10^30 times")
        return count
