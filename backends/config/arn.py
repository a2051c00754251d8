"""ARNs of S3 in a URI: an access point's is taken as a bucket, and every other kind is refused by name."""

from __future__ import annotations

import re
from typing import Final, NoReturn

from cloudckpt.backends.errors import ConfigurationError

_ACCESS_POINT: Final = re.compile(
    r"(?P<arn>arn:aws[a-z-]*:s3:[a-z0-9-]+:[0-9]{12}:accesspoint[/:][a-z0-9][a-z0-9-]{1,48}[a-z0-9])"
    r"(?:/(?P<path>.*))?",
    re.DOTALL,
)
_BUCKET: Final = re.compile(r"arn:aws[a-z-]*:s3:::(?P<name>[^/:*]+)(?:/(?P<path>.*))?", re.DOTALL)
_KINDS: Final = (
    (re.compile(r"arn:[^:]*:s3-outposts:.*"), "of S3 on Outposts"),
    (re.compile(r"arn:[^:]*:s3-object-lambda:.*"), "of an Object Lambda access point"),
    (re.compile(r"arn:[^:]*:s3::[0-9]*:accesspoint[/:].*"), "of a multi-region access point"),
    (re.compile(r"arn:[^:]*:s3express:.*"), "of a directory bucket"),
)
_ALIAS: Final = (
    "Use a bucket, an access point as s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix, "
    "or its alias as s3://NAME-...-s3alias/prefix"
)


def is_arn(text: str) -> bool:
    """Return True if the text begins as an ARN does."""
    return text.startswith("arn:")


def refuse_bare(text: str) -> NoReturn:
    """Refuse an ARN without ``s3://`` before it.

    Raises:
        ConfigurationError: always; the hint has the URI to write.
    """
    parted(text)  # refuses all but an access point's
    raise ConfigurationError("an ARN is not a URI", uri=text, hint=f"Write s3://{text}")


def parted(rest: str) -> tuple[str, str]:
    """Return an access point's ARN, as botocore takes it for a bucket, and the key prefix behind it.

    Args:
        rest: a URI behind ``s3://``.

    Raises:
        ConfigurationError: it is another ARN.
    """
    uri = f"s3://{rest}"
    if match := _ACCESS_POINT.fullmatch(rest):
        return match["arn"], match["path"] or ""
    if match := _BUCKET.fullmatch(rest):
        path = (match["path"] or "").rstrip("*").rstrip("/")  # a policy's ARN often ends in /*
        right = f"s3://{match['name']}" + (f"/{path}" if path else "")
        raise ConfigurationError(
            "a bucket is written by its name, and not by its ARN", uri=uri, hint=f"Write {right}"
        )
    for pattern, kind in _KINDS:
        if pattern.fullmatch(rest):
            message = f"an ARN {kind} is not supported as the place of checkpoints"
            raise ConfigurationError(message, uri=uri, hint=_ALIAS)
    raise ConfigurationError("this is not the ARN of an S3 access point", uri=uri, hint=_ALIAS)
