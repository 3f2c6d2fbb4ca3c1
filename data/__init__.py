"""Text and tokens: a corpus that ships with the project, and your own text (`data.prepare`)."""


class DataError(Exception):
    """One line for a person: what is wrong, where, and what to do about it."""
