"""One job at a time has the device: among all processes of this user on this machine, whatever their RETUNE_HOME."""

from filelock import FileLock, Timeout

from studio import machine
from studio.paths import locks_folder, projects_root


class DeviceLock:
    """Locks that the system releases when their holder ends, however it ends: that of the home, which several machines
    and users may share, and one for each device that a job here may use.

    `is_elsewhere`: a job of another home has the device.
    """

    def __init__(self) -> None:
        self.is_elsewhere = False
        self._home = FileLock(projects_root() / ".device.lock")
        self._devices = [FileLock(locks_folder() / f"{name}.lock") for name in machine.device_names()]

    def take(self) -> bool:
        """Whether all of them are held now, or none."""
        try:
            self._home.acquire(timeout=0)
        except Timeout:
            self.is_elsewhere = False
            return False
        try:
            for each in self._devices:
                each.acquire(timeout=0)
        except Timeout:
            self.release()
            self.is_elsewhere = True
            return False
        return True

    def release(self) -> None:
        for each in (*self._devices, self._home):
            each.release(force=True)
