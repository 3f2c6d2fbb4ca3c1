"""What any training run needs; nothing of the method. Each file begins with what it holds."""

import os

from data import DataError

# Threads that wait for each other soon leave the core to other programs: beside these, steps were
# three to four times as fast. This is read when torch is imported
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


class UserError(DataError):
    """One line for a person: what is wrong, where, what to do. `code` is the exit code: 2 for bad
    input, found before anything was written; 1 for what went wrong later."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code
