"""Why a linear region is left as it is. Importing this needs no torch."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """Why a region is declined. The list is closed."""

    BIAS_BEFORE_PADDING = "a bias before zero padding, which the border would see"
    PADDING_BETWEEN = "zero padding between two spatial kernels"
    TRANSPOSED = "a transposed convolution next to a spatial kernel"
    STRIDES = "branches of different strides"
    SIZES = "branches whose outputs differ in size"
    CHANNELS = "operands that broadcast instead of agreeing in channels and rank"
    PADDING = "pads that one convolution layer cannot have: differing on two sides in torch, or negative"
    PADDING_MODE = "padding by other values than zeros"
    BATCH_STATISTICS = "a normalization by the statistics of the batch"
    INPUT_DEPENDENT = "a kernel that depends on the input"
    SEVERAL_OUTPUTS = "an inner value that is used outside of it"
    WRITTEN_IN_PLACE = "a value that is written in place while others read it"
    HOOK = "a hook on one of its modules"
    UNTRACEABLE = "its module cannot be traced by itself"
    MORE_MACS = "one convolution would cost more MACs"
    MORE_PARAMETERS = "one convolution would have more parameters"
    NOT_EQUAL = "its own check in float64 failed"


class Declined(Exception):
    """A region that is not, or should not become, one convolution."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason
