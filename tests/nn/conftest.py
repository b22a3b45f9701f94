"""The libraries of product.c, one after the other."""

import pytest
from support_native import PROCESSORS, REAL

from doconv_convert.nn import native


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of processor that this one can be."""
    for dtype, real in REAL.items():
        library = native.load(request.param, real)
        if library is None:
            pytest.skip("the package was built without a C compiler")
        monkeypatch.setitem(native.LIBRARIES, dtype, library)
    return str(request.param)
