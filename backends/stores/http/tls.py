"""TLS by what botocore and requests call ``verify``."""

from __future__ import annotations

import ssl
from pathlib import Path


def context(verify: bool | str) -> ssl.SSLContext:
    """Return a client's context: a file or folder of authorities, the host's own ones, or no check at all."""
    if isinstance(verify, str):
        is_folder = Path(verify).is_dir()
        return ssl.create_default_context(
            cafile=None if is_folder else verify, capath=verify if is_folder else None
        )
    made = ssl.create_default_context()
    if not verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    return made
