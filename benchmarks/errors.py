"""How a benchmark ends that cannot be done."""


class BenchError(Exception):
    """What went wrong, in one line for the person at the terminal. Commands end with code 2."""
