"""The key that programs show to a model server. Each server makes one for itself, unless the person has set their own:
then all servers of this studio take that, and programs need not be told anew. It lies in a file of its owner's."""

import os

from studio.errors import ServerError
from studio.paths import atomic_path, discard, system_folder

FILE = "server.key"
MIN_LENGTH, MAX_LENGTH = 16, 200


def own_key() -> str:
    """The key that the person has set; "" when servers make their own."""
    path = system_folder() / FILE
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def set_own_key(key: str) -> None:
    """Servers that start from now on take this key; "" lets each make its own again. Raises ServerError."""
    path, key = system_folder() / FILE, key.strip()
    if not key:
        return discard(path)
    if not (MIN_LENGTH <= len(key) <= MAX_LENGTH and key.isascii() and key.isprintable() and " " not in key):
        raise ServerError(
            f"A key of {len(key)} characters cannot be used.",
            f"Take {MIN_LENGTH} to {MAX_LENGTH} letters, digits and signs without spaces.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key)
    return None
