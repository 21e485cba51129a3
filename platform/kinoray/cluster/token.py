"""The token of a closed cluster: where it is found, and a file for it that its owner alone can read.

Easy to break: it appears in no message, and it is taken from no file that others can read: with it they run code there.
"""

import os
import secrets
from pathlib import Path

from kinoray.errors import ClusterError, ConfigError

__all__ = ["find_token", "private_token_file"]


def find_token(url: str) -> str:
    """The token for a closed cluster, from where Ray takes it, too.

    Raises:
        ClusterError: there is none.
        ConfigError: its file can be read by others.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(given).expanduser() if given else _default_file()
    try:
        mode, token = path.stat().st_mode & 0o777, path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ClusterError(
            f"{url} asks for a token, and there is none: {path}: {error.strerror or error}; let RAY_AUTH_TOKEN_PATH "
            "name a file that holds it (mode 0600), or set RAY_AUTH_TOKEN"
        ) from error
    if mode & 0o077:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} can be read by others (mode {mode:04o}); chmod 600 {path}")
    if not token:
        raise ClusterError(f"{url} asks for a token, and {path} is empty; write the cluster's token into it")
    return token


def private_token_file() -> Path:
    """Ray's token file of this user, mode 0600, made if there is none; Ray itself would let others read it.

    Raises:
        ConfigError: it cannot be written.
    """
    path = _default_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be written: {error.strerror or error}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    return path


def _default_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
