"""A running S3 server, and a way to its objects that is none of the store's."""

from __future__ import annotations

import functools
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server."""

    name: str
    endpoint: str
    """URL without a trailing slash."""
    key: str
    secret: str = field(repr=False)
    pid: int

    @property
    def credentials(self) -> tuple[str, str]:
        """Access key and secret key."""
        return self.key, self.secret

    @property
    def storage_options(self) -> dict[str, str]:
        """The credentials as s3fs names them."""
        return {"key": self.key, "secret": self.secret}

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which any S3 client finds this server without being told."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> S3Client:
        """Return a boto3 client, shared by all callers, to look at the server round the code under test."""
        return _client(self)

    def new_bucket(self) -> str:
        """Create an empty bucket with a fresh name and return the name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


@functools.cache
def _client(server: S3Server) -> S3Client:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        config=Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
