"""The kernels' tests stay out of this process: `test_kernels_apart.py` gives them their own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels", "interpreted"]
