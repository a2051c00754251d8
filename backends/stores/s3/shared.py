"""Clients kept from one save or load to the next: making a set takes longer than saving a small model.

Stores with equal options share a set, as long as nothing has changed where botocore looks for its
configuration: the environment, and the two files. So a new writer sees new credentials, as if it had made
clients of its own, and stores that share a server slow down together.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.http.users import release, use
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.throttle import Throttles
from cloudckpt.backends.transfer.request_limit import connections

_KEPT: Final = 4
"""Sets that are kept; a job has one, and another where it loads from elsewhere."""
_FILES: Final = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_READ_BY_CLIENTS: Final = ("AWS_", "BOTO", "FSSPEC_", "S3_", "SSL_CERT_", "HOME", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """The environment that clients depend on beside their options."""

    process: int
    variables: tuple[tuple[str, str], ...]
    files: tuple[tuple[int, int] | None, ...]

    @classmethod
    def now(cls) -> _Surroundings:
        variables = (
            (name, value)
            for name, value in os.environ.items()
            if name.startswith(_READ_BY_CLIENTS) or name.lower().endswith("_proxy")
        )
        files = (Path(os.environ.get(name, usual)).expanduser() for name, usual in _FILES.items())
        return cls(os.getpid(), tuple(sorted(variables)), tuple(map(_stamp, files)))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


@dataclass(frozen=True, slots=True)
class _Kept:
    options: Options
    surroundings: _Surroundings
    clients: Clients


_lock = threading.Lock()
_kept: list[_Kept] = []
"""The last used comes last."""


def _shared(target: Target, instead_of: Clients | None = None) -> Clients:
    """Return the clients for these options and surroundings, and never those that have to be replaced."""
    surroundings = _Surroundings.now()
    with _lock:
        _kept[:] = [
            one
            for one in _kept
            if one.clients is not instead_of and one.surroundings.process == surroundings.process
        ]
        for place, one in enumerate(_kept):
            if one.options == target.options and one.surroundings == surroundings:
                _kept.append(_kept.pop(place))
                return one.clients
        paces = instead_of.paces if instead_of is not None else Throttles.of(connections(target.options))
        clients = Clients(target, paces)
        _kept.append(_Kept(target.options, surroundings, clients))
        del _kept[:-_KEPT]
        return clients


class SharedClients:
    """One store's hold on clients: found when first needed, and anew in a process that was forked."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._held: tuple[int, Clients] | None = None
        self._uses = False
        """True while the connections of the clients are noted as used by this store."""

    def get(self) -> Clients:
        """Return this process's clients."""
        held = self._held
        if held is None or held[0] != os.getpid():
            with self._lock:
                held = self._held
                if held is None or held[0] != os.getpid():
                    self._held = held = (os.getpid(), _shared(self._target))
        if not self._uses:
            self._uses = True
            use(held[1], self)
        return held[1]

    def renew(self, expired: Clients) -> bool:
        """Turn to clients that have looked for credentials afresh, unless another thread has done so.

        Returns whether there are others now.
        """
        if not expired.renewable:
            return False
        with self._lock:
            if self._held is not None and self._held[1] is expired:
                self._held = (os.getpid(), _shared(self._target, instead_of=expired))
                self._uses = False
                expired.close()
        return True

    def close(self) -> None:
        """Close idle connections, unless another store uses them. The clients open new ones when needed."""
        with self._lock:
            held, self._uses = self._held, False
        if held is not None and held[0] == os.getpid() and release(held[1], self):
            held[1].close()
