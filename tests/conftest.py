"""Two test processes side by side: each keeps to one OpenMP thread, or they wait for each other, spinning."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
