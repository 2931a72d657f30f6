"""Keys: the salted names by which patients, studies, series and scans go outside `medssl.scans`."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medssl.atomic import atomic_write, disk_errors
from medssl.errors import ConfigError, MachineError

Kind = Literal["patient", "study", "series", "scan", "file"]

KEY_LENGTH = 16  # hexadecimal digits: 64 bits, so a million scans collide with chance 3e-8
_SALT_BYTES = 32
_SALT_PATTERN = re.compile(r"[0-9a-f]{64}")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class Salt:
    """The secret that turns identifiers into keys; it never leaves the private folder."""

    secret: bytes = field(repr=False)

    @classmethod
    def load_or_create(cls, path: Path, public: str | None = None) -> Salt:
        """Read the salt, or draw one and write it with mode 0600.

        The same salt gives the same keys, so an index that is built again keeps its names.

        Args:
            path: of the file.
            public: of public data: the text that the salt is made of, the same for everybody.

        Raises:
            ConfigError: the file holds another salt than that of ``public``.
            MachineError: other users may read the file, or it holds no salt.
        """
        if not path.exists():
            private_folder(path.parent)
            drawn = _of_text(public) if public else secrets.token_hex(_SALT_BYTES)
            atomic_write(path, drawn + "\n", mode=0o600)
        if path.stat().st_mode & _OTHERS:
            mode = stat.S_IMODE(path.stat().st_mode)
            raise MachineError(
                f"the salt of the index can be read by other users (mode {mode:04o}, wanted 0600). "
                "Who has it can find out which keys belong to a known patient. Run "
                "`chmod 600` on private/salt, or remove the index and build it again."
            )
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _SALT_PATTERN.fullmatch(text):
            raise MachineError(
                "private/salt of the index does not hold 64 hexadecimal digits. Restore it from a "
                "backup, or remove the index and build it again: the keys will then change."
            )
        if public and text != _of_text(public):
            raise ConfigError(
                "public_salt: the index has a salt of its own already, and its keys belong to that "
                "one. Leave public_salt out, or build the index in another folder."
            )
        return cls(bytes.fromhex(text))

    def key(self, kind: Kind, text: str) -> str:
        """Return the key of one identifier: 16 hexadecimal digits of its HMAC-SHA256."""
        message = f"{kind}\x1f{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:KEY_LENGTH]


def _of_text(text: str) -> str:
    return hashlib.sha256(f"medssl public data\x1f{text}".encode()).hexdigest()


def private_folder(path: Path) -> Path:
    """Create a folder that only its owner may enter."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    return path


def name_of_scanner(manufacturer: str, model: str) -> str:
    """Return what a scanner's key is made of; "" where nothing is known."""
    return _named("scanner", manufacturer, model)


def name_of_site(institution: str) -> str:
    """Return what a site's key is made of; "" where nothing is known."""
    return _named("site", institution)


def _named(kind: str, *names: str) -> str:
    """Return names as one text, whatever their capitals and blanks."""
    plain = [" ".join(name.upper().split()) for name in names]
    return "\x1f".join([kind, *plain]) if any(plain) else ""
