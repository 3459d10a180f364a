"""Processes that were started here: how they ended, in words."""

import signal


def ending(code: int) -> str:
    """How a process ended whose exit code this is, a signal's negative as multiprocessing and subprocess have it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # most real-time signals have no name
        name = f"signal {-code}"
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
