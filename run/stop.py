"""Signals that ask a run to stop."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: the warning of a batch system


class Stop:
    """A signal asks for a stop at the step's end; a second one, of any kind, ends the process at
    once. `signal`: the number of the first, or 0.
    """

    def __init__(self):
        self.signal, self.before = 0, {}

    def __enter__(self) -> "Stop":
        return self

    def listen(self) -> None:
        """Catch signals from now on. Until now a signal ends the process, which may be waiting for
        a rank that has died."""
        self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}

    def ask(self, number: int, frame) -> None:
        self.signal = number
        for any_number in SIGNALS:
            signal.signal(any_number, signal.SIG_DFL)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
