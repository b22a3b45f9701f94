"""What only a CUDA device can show: `pytest -m gpu`."""

import pytest
import torch
from torch import nn

from doconv_convert import to_doconv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_exact_start() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, groups=4)).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    assert torch.equal(to_doconv(plain)(x), plain(x))
