"""Rules for a proxy: S3 as other servers speak it, where none of the servers that run in tests does.

Each was seen on the server that its docstring names, or is in an issue of its project.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from support.proxy import Answer, Request, Rule, Spoiling

_CHECKSUM = "x-amz-checksum-"


def rgw(request: Request) -> Spoiling:
    """Refuse an entity tag in quotes, also the right one, as Ceph RGW 16.2 does."""
    quoted = request.headers.get("if-match", "").startswith('"')
    return Answer(412, "PreconditionFailed") if quoted else None


def no_if_match(request: Request) -> Spoiling:
    """Refuse every put over a version."""
    return Answer(412, "PreconditionFailed") if "if-match" in request.headers else None


def no_if_none_match(request: Request) -> Spoiling:
    """Refuse every put that must find nothing."""
    return Answer(412, "PreconditionFailed") if "if-none-match" in request.headers else None


def swift(request: Request) -> Spoiling:
    """Take no condition on PUT, and no DeleteObjects without Content-MD5, as Swift 2.30's s3api."""
    if request.method == "PUT" and request.headers.keys() & {"if-match", "if-none-match"}:
        return Answer(501, "NotImplemented")
    return wants_md5(request)


def wants_md5(request: Request) -> Spoiling:
    """Take no DeleteObjects without Content-MD5, as MinIO of before 2025 and JuiceFS's gateway."""
    lacking = request.operation == "DeleteObjects" and "content-md5" not in request.headers
    return Answer(400, "MissingContentMD5") if lacking else None


def without_delete_objects(status: int, code: str) -> Rule:
    """Have no DeleteObjects, as Google Cloud Storage's S3 interface (400) and older Ceph (405, 501)."""
    return lambda request: Answer(status, code) if request.operation == "DeleteObjects" else None


def object_lock(request: Request) -> Spoiling:
    """Demand a checksum with what is written, as a bucket with a default retention of Object Lock."""
    names = request.headers.keys()
    has_one = "content-md5" in names or any(name.startswith(_CHECKSUM) for name in names)
    written = ("PutObject", "UploadPart", "DeleteObjects")
    demanded = request.operation in written and "x-amz-copy-source" not in names
    return Answer(400, "InvalidRequest") if demanded and not has_one else None


def md5_alone(request: Request) -> Spoiling:
    """Demand Content-MD5 with what is written, and take no CRC in its place."""
    lacking = request.operation in ("PutObject", "UploadPart") and "content-md5" not in request.headers
    return Answer(400, "InvalidRequest") if lacking else None


def pages_for_uploads(request: Request) -> Spoiling:
    """Answer 501 with a web page to what lists or aborts uploads, as a gateway before a server may."""
    unsupported = request.operation in ("ListMultipartUploads", "AbortMultipartUpload")
    return Answer(501, "", {"Content-Type": "text/html"}) if unsupported else None


def without(operation: str, status: int = 501) -> Rule:
    """Have no such operation."""
    code = "NotImplemented" if status == 501 else "MethodNotAllowed"
    return lambda request: Answer(status, code) if request.operation == operation else None


def verifying(algorithm: str) -> Callable[[Request], Spoiling]:
    """Refuse the first put that has a checksum of an algorithm, which is a probe's wrong one."""
    seen = itertools.count()

    def decide(request: Request) -> Spoiling:
        has_one = request.operation == "PutObject" and f"{_CHECKSUM}{algorithm}" in request.headers
        return Answer(400, "BadDigest") if has_one and next(seen) == 0 else None

    return decide


def all_of(*rules: Rule) -> Rule:
    """Apply the first rule that says anything."""

    def decide(request: Request) -> Spoiling:
        return next((said for rule in rules if (said := rule(request)) is not None), None)

    return decide
