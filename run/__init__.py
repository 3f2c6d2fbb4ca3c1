"""What a run needs beside the four files. Each file begins with what it holds."""

import os

# Makes threads that wait for each other leave the core soon. Beside other programs, that made steps
# three to four times as fast. torch reads it when it is imported
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
