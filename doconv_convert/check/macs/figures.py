"""Counts of MACs as text: written, read and compared. Importing this needs neither onnx nor torch."""

from doconv_convert.check.macs.result import MacCount
from doconv_convert.errors import UsageError
from doconv_convert.words import UNITS, counted

# No budget is larger: the largest networks take some 1e16 MACs a sample.
_MOST_DIGITS = 30


def format_macs(macs: int) -> str:
    """'1.814 GMACs', '312.4 MMACs', '123 MACs': four digits, and always the unit (FLOPs are 2 x MACs)."""
    for prefix, unit in UNITS:
        if macs * 100_000 >= unit * 99_995:  # what rounds to 1.000 of a unit is written in it
            return f"{macs / unit:#.4g} {prefix}MACs"
    return f"{macs} MACs"


def describe_count(count: MacCount) -> str:
    """The total, exact and short, and over how many nodes."""
    nodes = counted(len(count.nodes), "node")
    return f"{count.total:,} MACs ({format_macs(count.total)}; FLOPs = 2 x MACs) in {nodes}"


def parse_macs(text: str) -> int:
    """MACs from '4.1G', '312.4 MMACs' or '1814073344'; exact, no rounding. Raises UsageError."""
    from decimal import Decimal, InvalidOperation

    number = text.strip().removesuffix("MACs").strip()
    scale = next((unit for prefix, unit in UNITS if number.endswith((prefix, prefix.upper()))), 1)
    try:
        macs = Decimal(number[:-1] if scale > 1 else number) * scale
    except InvalidOperation:
        macs = Decimal(-1)
    if not macs.is_finite() or macs < 0 or macs.adjusted() > _MOST_DIGITS or "FLOP" in text.upper():
        raise UsageError(f"got '{text}', expected MACs such as 4.1G, 312M or 1814073344 (FLOPs are 2 x MACs).")
    return int(macs)  # a fraction of a MAC allows none more


def compare_counts(a: MacCount, b: MacCount) -> list[str]:
    """A sentence for every difference in MACs, `a` being what was expected; nodes are compared by position.

    Parameters are not compared: an exporter drops a bias that happens to be zero.
    """
    found = []
    if a.total != b.total:
        found.append(f"total: expected {_exact(a.total)} got {_exact(b.total)}")
    if len(a.nodes) != len(b.nodes):
        found.append(f"multiplying nodes: expected {len(a.nodes)} got {len(b.nodes)}")
    for index, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=False)):
        if (x.op, x.macs) != (y.op, y.macs):
            expected, got = (f"{n.op} '{n.name}', {_exact(n.macs)}" for n in (x, y))
            found.append(f"multiplying node {index}: expected {expected}; got {got}")
    for op in sorted(a.uncounted.keys() | b.uncounted.keys()):
        expected_nodes, got_nodes = a.uncounted.get(op, 0), b.uncounted.get(op, 0)
        if expected_nodes != got_nodes:
            found.append(f"uncounted {op} nodes: expected {expected_nodes} got {got_nodes}")
    return found


def _exact(macs: int) -> str:
    return f"{format_macs(macs)} ({macs:,})"
