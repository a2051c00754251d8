"""The clients of an S3 store: botocore clients made from the configuration of an s3fs file system.

s3fs takes the options first, so that ``storage_options`` mean here what they mean there. It
makes no request: aiohttp below it follows redirections and sends the session token along, to any host.

botocore does not retry: :mod:`~cloudckpt.backends.stores.retry` does, above it. Its standard mode with one
attempt still follows a bucket into its region, and `answers` checks the host that it goes to.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiobotocore.session
import botocore.loaders
import botocore.session
import s3fs
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from botocore.httpsession import get_cert_path
from s3fs.utils import ParamKwargsHelper

from cloudckpt.backends.config.endpoint_url import is_address
from cloudckpt.backends.config.options import Options
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores.failure_causes import Route
from cloudckpt.backends.stores.http.botocore_session import use_connections
from cloudckpt.backends.stores.http.proxies import proxy_of
from cloudckpt.backends.stores.http.request_body import BuffersBody
from cloudckpt.backends.stores.s3 import answers as s3_answers
from cloudckpt.backends.stores.s3.checksums import content_md5
from cloudckpt.backends.stores.s3.completion import Completion
from cloudckpt.backends.stores.s3.connections import Connections
from cloudckpt.backends.stores.s3.endpoint import checked_endpoint
from cloudckpt.backends.stores.throttle import ON_BEHALF, Throttles
from cloudckpt.backends.transfer.request_limit import connections
from cloudckpt.backends.version import __version__

_Session = TypeVar("_Session", bound=botocore.session.Session)

_CONNECT_SECONDS = 5.0
SETTINGS: Final = "the option endpoint_url or AWS_ENDPOINT_URL"
"""Names of what says where the server is, for errors."""
_LONG_BODY: Final = 8 << 20
"""Bytes of a body that waits for the server to ask for it."""
_PATIENCE: Final = 10
"""Timeouts that an answer to CompleteMultipartUpload may take: S3 takes minutes for large objects."""
_ONE_ATTEMPT: Final = {"mode": "standard", "total_max_attempts": 1}
_CREDENTIALS: Final = frozenset({"aws_access_key_id", "aws_secret_access_key", "aws_session_token"})


class Clients:
    """The S3 clients of one process. Each may be used from several threads."""

    def __init__(self, target: Target, paces: Throttles) -> None:
        self.paces = paces
        self.fs: Any = _file_system(target.options)
        if unknown := sorted(self.fs.kwargs.keys() - {"profile"}):
            message = f"s3fs knows no {', '.join(unknown)} in storage_options"
            raise ConfigurationError(message, uri=target.uri)
        if self.fs.config_kwargs["retries"] != _ONE_ATTEMPT:
            message = "botocore's retries are off, and storage_options turns them on"
            raise ConfigurationError(message, uri=target.uri, hint="Use the option retries instead")
        self._session = _prepared(botocore.session.Session(**self.fs.kwargs))
        endpoint = checked_endpoint(self.fs.endpoint_url, self._session)
        given = self.fs.config_kwargs["s3"]
        if endpoint and is_address(endpoint) and given.get("addressing_style") == "virtual":
            # No bucket's name can stand before an IP address.
            self.fs.config_kwargs["s3"] = {**given, "addressing_style": "path"}
        self._lock = threading.Lock()
        self._patient: Any = None
        self._completion: Completion | None = None
        self._follows_regions = endpoint is None
        self.data: Any = _client(self._session, self.fs, self.fs.config_kwargs)
        """botocore's S3 client, whose methods are generated at run time."""
        self.endpoint = _without_secrets(str(self.data.meta.endpoint_url))
        """For errors and logs."""
        self.route = Route(
            self.endpoint,
            SETTINGS,
            proxy_of(str(self.data.meta.endpoint_url), self.fs.config_kwargs.get("proxies")),
            self.verify,
        )
        """For errors and doctor."""
        self._check(self.data)
        if self.endpoint.startswith("https:"):
            _check_authorities(self.route.verify, shown="verify" not in self.fs.client_kwargs)
        self._filter = ParamKwargsHelper(self.data)

    @property
    def patient(self) -> Any:
        """The same with more time for an answer: for copies, and for what assembles an object."""
        with self._lock:
            if self._patient is None:
                given = self.fs.config_kwargs
                seconds = given["read_timeout"] and given["read_timeout"] * _PATIENCE
                connections = max(given["max_pool_connections"], ON_BEHALF)
                own = {"read_timeout": seconds, "max_pool_connections": connections}
                self._patient = _client(self._session, self.fs, {**given, **own})
                self._check(self._patient)
            return self._patient

    @property
    def completion(self) -> Completion:
        """CompleteMultipartUpload by the patient client."""
        client = self.patient
        with self._lock:
            if self._completion is None:
                self._completion = Completion(
                    client, Connections(client.meta.config, self.verify, self.route.proxy)
                )
            return self._completion

    @property
    def renewable(self) -> bool:
        """True if credentials may be renewed, as those that are not from ``storage_options``."""
        fs = self.fs
        return not (fs.anon or fs.key or fs.secret or fs.token or _CREDENTIALS & fs.client_kwargs.keys())

    @property
    def credentials(self) -> Any:
        """botocore's, where they come from outside of ``storage_options``; None where it finds none."""
        return self._session.get_credentials()

    @property
    def has_expired(self) -> bool:
        """Return True if renewable credentials have expired, also after a request for newer ones."""
        found = self.credentials
        return isinstance(found, RefreshableCredentials) and bool(found.refresh_needed(refresh_in=0))

    @property
    def verify(self) -> bool | str:
        """The ``verify`` of botocore: a file or folder of authorities, or False for no verification."""
        given = self.fs.client_kwargs.get("verify")
        if given is None:
            given = self._session.get_config_variable("ca_bundle")  # of the environment or the profile
        if given is None:
            given = os.environ.get("REQUESTS_CA_BUNDLE") or True
        return given if isinstance(given, str) or given is False else str(get_cert_path(verify=True))

    @property
    def is_aws(self) -> bool:
        """True if this is S3 itself, and not another server that speaks its protocol."""
        return is_aws(self.endpoint)

    def arguments(self, method: str, **own: Any) -> dict[str, Any]:
        """Return ``own`` and what the options add here: encryption, storage class, requester pays."""
        common: dict[str, Any] = {**self.fs.s3_additional_kwargs, **self.fs.req_kw}
        return {**self._filter.filter_dict(method, common), **own}

    def _check(self, client: Any) -> None:
        """Have a client check hosts and answers."""
        follows = self._follows_regions and self.is_aws
        s3_answers.check_answers(client, self.route, follows_regions=follows)

    def close(self) -> None:
        """Close the connections for data."""
        self.data.close()
        with self._lock:
            if self._patient is not None:
                self._patient.close()
            if self._completion is not None:
                self._completion.close()


def _check_authorities(verify: bool | str, *, shown: bool) -> None:
    """Check that the file or folder of authorities exists, which botocore finds out at each request.

    Errors show no values of ``storage_options``: ``shown`` is False for one of those.
    """
    if isinstance(verify, str) and not Path(verify).exists():
        path = f" {verify!r}" if shown else ""
        raise ConfigurationError(
            f"the file of certificate authorities{path} does not exist",
            hint="Check the variables AWS_CA_BUNDLE and REQUESTS_CA_BUNDLE, ca_bundle of the AWS profile, "
            "and verify in client_kwargs of storage_options",
        )


def is_aws(endpoint: str) -> bool:
    """Return True if an endpoint is S3 itself, and not another server that speaks its protocol."""
    return s3_answers.is_aws(urlsplit(endpoint).hostname or "")


def _file_system(options: Options) -> s3fs.S3FileSystem:
    given = dict(options.storage_options)
    client = dict(given.pop("client_kwargs", None) or {})
    # s3fs takes an endpoint in two places; the option goes before both.
    endpoints = (options.endpoint_url, given.pop("endpoint_url", None), client.pop("endpoint_url", None))
    endpoint = next(filter(None, endpoints), None)
    if options.region:
        client["region_name"] = options.region
    given_profile = given.pop("profile", None)
    profile = options.profile or given_profile
    core: dict[str, Any] = {"profile": profile} if profile else {}
    session = _prepared(aiobotocore.session.AioSession(**core))
    arguments: dict[str, Any] = {
        **given,
        **core,
        "endpoint_url": endpoint,
        "client_kwargs": client,
        "config_kwargs": _config(options, given.get("config_kwargs") or {}),
        "s3_additional_kwargs": {**(given.get("s3_additional_kwargs") or {}), **_written(options)},
        "session": session,
        # Listings must show what other processes did a moment ago, and instances must not be shared.
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }
    if options.anon:
        arguments["anon"] = True
    if options.requester_pays:
        arguments["requester_pays"] = True
    return s3fs.S3FileSystem(**arguments)


def _written(options: Options) -> dict[str, str]:
    """Return the parameters of what is written, as S3 names them."""
    parameters = {
        "ServerSideEncryption": options.sse,
        "SSEKMSKeyId": options.sse_kms_key_id,
        "StorageClass": options.storage_class,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _config(options: Options, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return botocore's configuration; what ``storage_options`` says goes before the defaults here."""
    return {
        "connect_timeout": min(options.timeout, _CONNECT_SECONDS),
        "read_timeout": options.timeout,
        "max_pool_connections": connections(options),
        "retries": _ONE_ATTEMPT,
        # No checksum that was not asked for: several servers refuse, or store, the trailer that carries it.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **given,
        # Signing a body means reading it once more: TLS and the part's checksum guard it instead.
        "s3": {"payload_signing_enabled": False, **(given.get("s3") or {})},
    }


def _client(session: botocore.session.Session, fs: Any, config: dict[str, Any]) -> Any:
    # The same arguments as s3fs gives its own client, in the same order of precedence.
    credentials = {
        "aws_access_key_id": fs.key,
        "aws_secret_access_key": fs.secret,
        "aws_session_token": fs.token,
    }
    arguments: dict[str, Any] = {
        "use_ssl": fs.use_ssl,
        "endpoint_url": fs.endpoint_url,
        **credentials,
        **fs.client_kwargs,
    }
    if fs.anon:
        config = {**config, "signature_version": UNSIGNED}
        arguments = {key: value for key, value in arguments.items() if key not in credentials}
    # Given as a whole, it is not put together anew for every request, which takes a tenth of one's time.
    named: dict[str, Any] = {"user_agent": f"cloudckpt/{__version__} {session.user_agent()}", **config}
    client = session.create_client("s3", config=Config(**named), **arguments)
    use_connections(client)
    client.meta.events.register("before-call.s3", _send_short_bodies_at_once)
    if not is_aws(str(client.meta.endpoint_url)):
        client.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
    return client


def _send_short_bodies_at_once(params: dict[str, Any], **_: Any) -> None:
    """Send a short body without ``Expect: 100-continue``.

    botocore has every file-like body wait for the server's word, which takes a round trip. That is worth it
    for a long body, which a server that is overloaded refuses before it is sent.
    """
    body = params.get("body")
    if isinstance(body, BuffersBody) and len(body) < _LONG_BODY:
        params["headers"].pop("Expect", None)


def _add_content_md5(params: dict[str, Any], **_: Any) -> None:
    """Send DeleteObjects with Content-MD5 as well.

    botocore 1.36 replaced it by CRC32. MinIO of before 2025, Swift and others demand it.
    """
    body = params["body"]
    params["headers"]["Content-MD5"] = content_md5(body if isinstance(body, bytes) else body.encode())


def _without_secrets(url: str) -> str:
    """Scheme, host and port of a URL: the environment's may hold a password, which no error should repeat."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _prepared(session: _Session) -> _Session:
    """Return the session with the settings that every session here has in common.

    botocore reads the region from AWS_DEFAULT_REGION and the profile alone. Without one, requests to STS for
    a role go to its global endpoint, and requests to S3 to us-east-1. Other AWS SDKs read AWS_REGION. The
    option region is given to clients, and botocore takes it for STS as well.
    """
    if not os.environ.get("AWS_DEFAULT_REGION") and (of_environment := os.environ.get("AWS_REGION")):
        session.set_config_variable("region", of_environment)
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return session


@functools.cache
def _loader(data_path: str | None) -> Any:
    """Return one loader of botocore's service models for all sessions: reading them takes 0.4 s of CPU."""
    return botocore.loaders.create_loader(data_path)
