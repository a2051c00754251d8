"""What S3 itself does: rules for a proxy, where no server from a package does it, and moto's IAM in force."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import boto3

from support.iam import Ask, Statement, allows, asked
from support.proxy import AddHeaders, Answer, DenyMissing, Proxy, Request, Rule, Spoiling
from support.servers import S3Server

_TOLERATED = 900.0
"""Seconds that the time of a signed request may be off by."""
_SCOPE = re.compile(r"Credential=[^/]+/\d{8}/(?P<region>[^/]+)/s3/")


def punctual(proxy: Proxy) -> Rule:
    """Refuse requests that were signed at another time than the proxy's clock shows, as S3 does."""

    def decide(request: Request) -> Spoiling:
        signed = datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        off = abs(signed.timestamp() - (time.time() + proxy.clock))
        return Answer(403, "RequestTimeTooSkewed") if off > _TOLERATED else None

    return decide


def in_region(region: str) -> Rule:
    """Refuse requests that were signed for another region, and say which is right, as S3 does."""
    told = {"x-amz-bucket-region": region}

    def decide(request: Request) -> Spoiling:
        scope = _SCOPE.search(request.headers.get("authorization", ""))
        if scope is None or scope["region"] != region:
            code = "" if request.method == "HEAD" else "AuthorizationHeaderMalformed"
            return Answer(400, code, told, {"Region": region})
        return AddHeaders(told)

    return decide


def elsewhere(region: str) -> Rule:
    """Send every request on to another region's endpoint, as S3 does at the endpoint of a wrong one."""
    return lambda _: Answer(301, "PermanentRedirect", {"x-amz-bucket-region": region})


def hides_missing(policy: Sequence[Statement]) -> Rule:
    """Answer 403 for objects that are not there, if the policy grants no s3:ListBucket to such a request.

    S3 judges the request's own context, in which a GetObject has no s3:prefix, so a grant under a condition
    on it does not count.
    """

    def decide(request: Request) -> Spoiling:
        if request.operation not in ("GetObject", "HeadObject"):
            return None
        bucket = next(asked(request)).resource.partition("/")[0]
        return None if allows(policy, Ask("s3:ListBucket", bucket)) else DenyMissing()

    return decide


@dataclass(frozen=True, slots=True)
class Policed:
    """A moto server of one's own whose IAM enforces the policy of a user, and answers as S3 does."""

    root: S3Server
    """The server with credentials that nothing is denied while the law rests."""
    user: S3Server
    """The server with the user's, behind the proxy."""
    iam: Any
    proxy: Proxy

    @contextmanager
    def under(self, *statements: Statement) -> Iterator[S3Server]:
        """Allow the user what the statements of a policy say, for the block."""
        document = json.dumps({"Version": "2012-10-17", "Statement": statements})
        self.iam.put_user_policy(UserName="job", PolicyName="job", PolicyDocument=document)
        self._lawless_requests("0")
        self.proxy.rule(hides_missing(statements))
        try:
            yield self.user
        finally:
            self.proxy.rule(None)
            self._lawless_requests("inf")

    @contextmanager
    def denying(self, *actions: str) -> Iterator[S3Server]:
        """Deny the user some actions and allow all others, for the block."""
        denied = [{"Effect": "Deny", "Action": [action], "Resource": ["*"]} for action in actions]
        with self.under({"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}, *denied) as user:
            yield user

    def _lawless_requests(self, count: str) -> None:
        """Have so many requests pass before policies are enforced."""
        connection = http.client.HTTPConnection(urlsplit(self.root.endpoint).netloc, timeout=60)
        with closing(connection):
            connection.request("POST", "/moto-api/reset-auth", count, {"Content-Type": "text/plain"})
            assert connection.getresponse().status == 200


def policed(server: S3Server, proxy: Proxy) -> Policed:
    """Make a user on a moto server that nobody else uses, who reaches it through the proxy."""
    iam: Any = boto3.session.Session().client(
        "iam",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
    )
    iam.create_user(UserName="job")
    made = iam.create_access_key(UserName="job")["AccessKey"]
    user = replace(server, endpoint=proxy.endpoint, key=made["AccessKeyId"], secret=made["SecretAccessKey"])
    return Policed(server, user, iam, proxy)
