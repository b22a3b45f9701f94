"""Small nets, each with one hazard for a converter of convolutions; every file stands alone.

- residual: a plain residual net with batch norm, 3x3 and 1x1 convolutions
- grouped: grouped, depthwise, dilated, 1x7/7x1 and padding='same' convolutions with channel shuffle
- functional: kernels that are bare Parameters, called with F.conv2d
- tied: kernels shared between layers, names and a decoder
- control_flow: a forward with Python control flow that torch.fx cannot trace
- digits: a small classifier for the 8x8 handwritten digits that lie beside it
"""
