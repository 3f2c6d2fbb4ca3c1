"""What any training run needs: knobs, plan, machine, Muon, folder, words. Nothing of the method."""


class UserError(Exception):
    """One line for a person: what is wrong, where, what to do. `code` is the exit code: 2 for bad
    input, found before anything was written; 1 for what went wrong later.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code
