"""What a run needs beside the four files. Each file begins with what it holds."""

import os

from data import UserError as UserError

# Threads that wait for each other soon leave the core to other programs: beside these, steps were
# three to four times as fast. This is read when torch is imported
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
