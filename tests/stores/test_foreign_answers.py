"""An answer of status 200 that is not that of the request is an error of the store, and never a success."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from cloudckpt.backends.errors import CheckpointError, StorageError
from support.foreign import ANSWERS, OPERATIONS, READS, WELL_FORMED
from support.gcs import GCSServer
from support.servers import S3Server
from support.spoilt import TRIED, Spoilt, is_of, spoilt

_MUST_FAIL = ("empty", "blank", "a foreign document", "an empty list", "deep XML", "deep JSON")
"""Answers that no operation can do anything with."""


@pytest.fixture(scope="module", params=TRIED)
def place(request: pytest.FixtureRequest, moto: S3Server, gcs: GCSServer) -> Iterator[Spoilt]:
    with spoilt(request.param, moto, gcs) as made:
        yield made


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # botocore leaves connections
def test_a_foreign_answer_is_never_a_success(place: Spoilt, operation: str) -> None:
    if place.kind == "gcs sessions" and operation == "ListMultipartUploads":
        pytest.skip("GCS lists no sessions")
    wrong: list[str] = []
    made = place.stage()
    for kind, answer in ANSWERS.items():
        made = made if operation in READS else place.stage()
        place.spoil(operation, answer)
        count = place.proxy.count
        try:
            is_true = OPERATIONS[operation](made)
        except CheckpointError as error:
            if not isinstance(error, (StorageError, ValueError)) or error.uri is None:
                wrong.append(f"{kind}: {error!r}")
            elif kind in _MUST_FAIL and not (isinstance(error, StorageError) and error.hint):
                wrong.append(f"{kind}: no StorageError with a cure: {error!r}")
        except Exception as error:  # noqa: BLE001 - which is what the test is about
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            if (not is_true and (operation, kind) not in WELL_FORMED) or (
                kind in _MUST_FAIL and operation != "CopyObject"
            ):
                wrong.append(f"{kind}: a success that is {'none' if not is_true else 'not told'}")
        if not any(
            is_of(place.kind, one, operation) for one in itertools.islice(place.proxy.all(), count, None)
        ):
            wrong.append(f"{kind}: no such request was made")
    assert not wrong, "\n".join(wrong)
