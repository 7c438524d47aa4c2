"""The text of a config file that someone names: of a plain file, of a size that configs have."""

from pathlib import Path

from studio.errors import ConfigError, Problem


def read_config(path: Path, max_bytes: int) -> str:
    """UTF-8 text of a file. Raises ConfigError for a missing, unreadable or larger one, and for pipes and devices,
    which would have no end."""
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise _problem(path, f"cannot be read: {str(path)!r} is {kind}", "a file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)  # never more, should the file grow
        if len(content) > max_bytes:
            size = max(path.stat().st_size, len(content))
            raise _problem(path, f"is {size:,} bytes long; no config is", f"at most {max_bytes:,}")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise _problem(path, f"cannot be read: there is no file {str(path)!r}") from None
    except UnicodeDecodeError as error:
        reason = f"cannot be read: byte {error.start} is not UTF-8 ({error.reason})"
        raise _problem(path, reason, "text in UTF-8; an editor can save it so") from None
    except OSError as error:
        raise _problem(path, f"cannot be read: {error}") from None


def _problem(path: Path, message: str, allowed: str = "") -> ConfigError:
    return ConfigError([Problem("(file)", message, allowed)], path.name)
