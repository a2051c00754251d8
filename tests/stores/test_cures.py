"""What keeps a run from its store has a text and a cure of its own, on save, on load and in doctor."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from functools import partial

import pytest
import torch
from google.auth.exceptions import RefreshError

from cloudckpt import Checkpointer
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, CheckpointError, ObjectNotFoundError, StorageError
from cloudckpt.backends.stores.failure_causes import Route
from cloudckpt.backends.stores.gcs import errors as gcs_errors
from support.findings import doctor
from support.gcs import GCSServer
from support.places import Place
from support.proxy import Answer, Proxy, RawAnswer, Request, Spoiling, proxied
from support.servers import S3Server

STATE = {"t": torch.ones(10)}
SKEW = 1832.0

S3: Mapping[str, tuple[Answer, type[CheckpointError], str, str]] = {
    "clock skew": (
        Answer(403, "RequestTimeTooSkewed"),
        StorageError,
        "31 min behind the server's (1,83",
        "Set the clock",
    ),
    "expired token": (Answer(400, "ExpiredToken"), AccessDeniedError, "have expired", "Log in again"),
    "invalid key": (
        Answer(403, "InvalidAccessKeyId"),
        AccessDeniedError,
        "does not know their access key",
        "was not deleted",
    ),
    "missing bucket": (Answer(404, "NoSuchBucket"), ObjectNotFoundError, "does not exist", "Create it"),
    "wrong region by 400": (
        Answer(400, "AuthorizationHeaderMalformed", more={"Region": "eu-west-1"}),
        StorageError,
        "in another region",
        "Set the option region to eu-west-1",
    ),
    "wrong region by 301": (
        Answer(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"}),
        StorageError,
        "in another region",
        "Set the option region to eu-west-1",
    ),
    "missing permission": (Answer(403, "AccessDenied"), AccessDeniedError, "was denied", "need s3:"),
}
"""Answer, error, and what text and hint say."""


def refusal(status: int, reason: str, message: str, ahead: float = 0.0) -> RawAnswer:
    """Answer as GCS does, by a clock that is ahead."""
    body = json.dumps({"error": {"code": status, "message": message, "errors": [{"reason": reason}]}})
    date = formatdate(time.time() + ahead, usegmt=True)
    head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nDate: {date}\r\n"
    return RawAnswer(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())


Case = tuple[Spoiling, type[CheckpointError], str, str]


def of_gcs() -> Mapping[str, Case]:
    """Answers of GCS by a clock of now."""
    return {
        "clock skew": (
            refusal(401, "authError", "Invalid Credentials", SKEW),
            AccessDeniedError,
            "31 min behind the server's",
            "Set the clock",
        ),
        "expired token": (
            refusal(401, "authError", "Invalid Credentials"),
            AccessDeniedError,
            "is not valid, or has expired",
            "Log in again",
        ),
        "missing bucket": (
            refusal(404, "notFound", "The specified bucket does not exist."),
            ObjectNotFoundError,
            "does not exist",
            "Create it",
        ),
        "missing permission": (
            refusal(403, "forbidden", "the account does not have access"),
            AccessDeniedError,
            "GCS denied",
            "needs storage.objects",
        ),
    }


Job = tuple[Proxy, Place, Checkpointer]


@pytest.fixture(scope="module", params=["s3", "gs"])
def job(request: pytest.FixtureRequest, moto: S3Server, gcs: GCSServer) -> Iterator[Job]:
    """A proxy before a server, a run there with one step, and its Checkpointer."""
    on_s3 = request.param == "s3"
    place = Place.on_server(moto, moto.new_bucket()) if on_s3 else Place.on_gcs(gcs, gcs.new_bucket())
    with proxied(place.options["endpoint_url"]) as proxy:
        behind = place.child("run").behind(proxy.endpoint)
        with Checkpointer(behind.uri, progress=False, retries=1, **behind.options) as checkpointer:
            checkpointer.save(1, STATE)
            yield proxy, behind, checkpointer
            proxy.forget()


def cases(place: Place) -> Mapping[str, Case]:
    return S3 if place.uri.startswith("s3:") else of_gcs()


def answered(place: Place, case: str, _request: Request) -> Spoiling:
    return cases(place)[case][0]


def raised(call: Callable[[], object]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        call()
    return caught.value


def test_each_refusal_has_its_own_text_and_cure(job: Job) -> None:
    proxy, place, checkpointer = job
    texts: dict[str, str] = {}
    for step, (case, (_, kind, text, cure)) in enumerate(cases(place).items(), 2):
        proxy.forget()
        proxy.clock = SKEW if case == "clock skew" else 0.0
        proxy.rule(partial(answered, place, case))
        for call in (partial(checkpointer.load, STATE), partial(checkpointer.save, step, STATE)):
            error = raised(call)
            assert type(error) is kind, (case, error)
            assert text in error.message and cure in (error.hint or ""), (case, str(error))
            assert place.uri in (error.uri or "")
        status, found = doctor(place)
        said = " ".join(f"{one['what']} {one['advice']} {one.get('action', '')}" for one in found.values())
        assert status == 1 and re.search(DOCTOR.get(case, re.escape(text)), said), (case, said)
        texts[case.partition(" by ")[0]] = f"{error.message.partition(' (')[0]}: {error.hint}"
    assert len(set(texts.values())) == len(texts) >= 4
    proxy.forget()
    proxy.clock = 0.0
    checkpointer.save(100, STATE)


DOCTOR = {"missing permission": r"s3:(List|Put)|storage\.objects\."}
"""What doctor says where it is not the error's text."""


def test_a_key_of_google_that_was_deleted_has_a_cure_of_its_own() -> None:
    refused = RefreshError("invalid_grant: Invalid JWT Signature.")  # type: ignore[no-untyped-call]
    target = Target.parse("gs://bucket/run")
    error = raised(lambda: _explain(target, refused))
    assert type(error) is AccessDeniedError
    assert "can't be renewed" in error.message and "key or account was not deleted" in (error.hint or "")


def _explain(target: Target, error: Exception) -> None:
    with gcs_errors.explained(target, Route("https://storage.googleapis.com", gcs_errors.SETTINGS)):
        raise error
