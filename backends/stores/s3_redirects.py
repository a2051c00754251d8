"""Redirects of S3 requests: a request, whose headers prove who sent it, goes to no other host than its own.

S3 redirects a request to a bucket's region, and botocore signs it anew for that region's host. That is the
one redirect that is followed, and only from one host of AWS to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class StayingSession(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore is untyped
    """aiobotocore's HTTP session, whose aiohttp follows no redirect.

    aiohttp would follow it with all headers but ``Authorization``: the session token goes with them.
    aiobotocore has no option for that. It takes its session from ``_get_session`` since 2.0.
    """

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _Staying(await super()._get_session(proxy_url))


class _Staying:
    """An aiohttp session, as far as aiobotocore uses it for requests."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *arguments: Any, **options: Any) -> Any:
        return self._session.request(*arguments, **{**options, "allow_redirects": False})


def stay(is_aws: Callable[[str], bool]) -> Callable[..., None]:
    """Return a handler of botocore's event ``before-call.s3`` that keeps a request where it is.

    Args:
        is_aws: returns True for the URL of a host of AWS.
    """

    def handle(params: dict[str, Any], model: Any, **_: Any) -> None:
        # A bucket's region is looked up by HeadBucket: redirected itself, that would be looked up for ever.
        if not is_aws(params["url"]) or model.name == "HeadBucket":
            params["context"]["s3_redirect"] = {
                **params["context"].get("s3_redirect", {}),
                "redirected": True,
            }

    return handle
