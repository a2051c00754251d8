"""botocore's HTTP session with this package's connections: the one place that uses botocore's private names.

botocore makes a session for each client and has no option for the classes of its connections. The names below
have been the same since botocore 1.11. A client without them keeps botocore's own connections, which move
bodies on the thread of each request: slower over TLS, and otherwise the same.
"""

from __future__ import annotations

from typing import Any

from cloudckpt.backends.stores.http.connections import AWS_POOLS
from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)


def use_connections(client: Any) -> None:
    """Have a client of botocore make its requests over connections whose bodies a loop moves."""
    try:
        session = client._endpoint.http_session  # noqa: SLF001
        pools = session._pool_classes_by_scheme  # noqa: SLF001 - proxies' managers take it when they are made
        manager = session._manager  # noqa: SLF001
    except AttributeError as error:
        _log.debug("botocore has no %s any more: its own connections move the bodies", error.name)
        return
    pools.update(AWS_POOLS)
    manager.pool_classes_by_scheme = pools
