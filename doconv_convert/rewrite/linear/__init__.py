"""Linear over-parameterizations of any kind: affine regions of a graph, each folded into one convolution."""
