"""What S3 servers get wrong: the tests of `support.conformance` that show it, and the reason."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import urllib3

FAULTS: Mapping[str, Mapping[str, str]] = {
    "moto": {
        "test_pending_uploads_are_listed_until_they_end": "dates every upload to 2010",
        "test_another_version_is_not_copied": "ignores the condition of a copy",
    },
    "ministack": {},
    "juicefs": {},
    "rclone": {
        "test_a_part_may_be_sent_again": "answers 501 to a part number that it has",
        "test_another_version_is_not_copied": "ignores the condition of a copy",
    },
}
RACES: Mapping[str, Mapping[str, str]] = {
    "rclone": {
        "test_a_reader_sees_the_old_object_or_the_new_never_a_mixture": "empties an object, then writes it",
    },
}


@functools.cache
def known_at(endpoint: str) -> Mapping[str, str]:
    """What the server at an endpoint is known to get wrong: moto's, which can be told by its own pages."""
    try:
        answer = urllib3.request("GET", f"{endpoint}/moto-api/", timeout=60, retries=False)
    except urllib3.exceptions.HTTPError:
        return {}
    return FAULTS["moto"] if answer.status == 200 and b"Moto" in answer.data else {}
