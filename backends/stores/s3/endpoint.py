"""The endpoint that botocore will use for S3, checked before botocore sees it.

botocore raises a plain ValueError for some malformed endpoints, and sends requests to others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import botocore.session

from cloudckpt.backends.config.endpoint_url import Fault, fault_of
from cloudckpt.backends.errors import ConfigurationError

_OF_ENVIRONMENT: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_LONGEST_LABEL: Final = 63


def checked_endpoint(given: str | None, session: botocore.session.Session) -> str | None:
    """Return the endpoint in force: of the options, else the environment or the profile. None is AWS itself.

    Raises:
        ConfigurationError: it is malformed; its source and the cure are named.
    """
    source, url = next(_candidates(given, session), ("", ""))
    fault = (fault_of(url) or _fault_of_host(url)) if url else None
    if fault is not None:
        shown = "" if fault.secret else f" {url!r}"
        raise ConfigurationError(f"the endpoint{shown} of {source} {fault.what}", hint=fault.cure)
    return url or None


def _candidates(given: str | None, session: botocore.session.Session) -> Iterator[tuple[str, str]]:
    """Yield endpoints and their sources in botocore's order of precedence."""
    if given:
        yield "the options", given
        return
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return
    for name in _OF_ENVIRONMENT:
        if value := os.environ.get(name):
            yield f"the environment variable {name}", value
    profile: Mapping[str, Any] = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    if value := services.get("s3", {}).get("endpoint_url"):
        yield f"the section [services {profile['services']}] in the AWS configuration", value
    if value := profile.get("endpoint_url"):
        yield f"the profile {session.profile or 'default'} in the AWS configuration", value


def _fault_of_host(url: str) -> Fault | None:
    """Return the fault of a host that botocore refuses and other clients take, such as an underscore."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if ":" in host:
        return None
    for label in host.split("."):
        if "_" in label or label.startswith("-") or label.endswith("-") or len(label) > _LONGEST_LABEL:
            what = f"has {host!r} as its host, which botocore does not take"
            cure = "Give the host a name of letters, digits and dashes (no underscore), or use its address"
            return Fault(what, cure)
    return None
