"""Signals that ask a run to stop."""

import signal
from time import sleep

# Those that exist. USR1: the warning of a batch system; BREAK: Ctrl-Break on Windows
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")]
GRACE = 0.5  # seconds


class Stop:
    """From now on a signal asks for a stop at the step's end; a second one ends the process at
    once. `signal`: the number of the first; 0 before it. What comes within GRACE of the first
    counts as the first: a terminal and torchrun may each send a signal for the same stop."""

    def __init__(self):
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        self.signal = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        sleep(GRACE)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
