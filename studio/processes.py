"""Is a process still the one that was started? Its id alone may have been given to another since."""

import psutil

CREATED_TOLERANCE_SECONDS = 2


def created(pid: int) -> float:
    """Creation time of a process in seconds since the epoch; 0.0 when it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def lives(pid: int, process_created: float) -> bool:
    """Whether the very process of this id and creation time still runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - process_created) < CREATED_TOLERANCE_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
