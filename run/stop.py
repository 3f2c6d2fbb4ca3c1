"""Signals that ask a run to stop."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: the warning of a batch system


class Stop:
    """From now on a signal asks for a stop at the step's end; a second one, whichever of the three,
    ends the process at once. `signal`: the number of the first; 0 before it.
    """

    def __init__(self):
        self.signal = 0
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        self.signal = number
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
