"""Who may do what in the buckets of the GCS server of the tests: everything that was not denied.

Which permission a method takes is as in the Cloud Storage IAM reference ("IAM permissions for JSON methods").
A missing object is answered with 403 where listing is denied, be it only outside a prefix, as by a role with
a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from support.gcs_objects import Json, Refusal, invalid
from support.gcs_wire import Request

_LIST = "storage.objects.list"
_OUTSIDE = f"{_LIST} outside "
_OF_AN_OBJECT: Mapping[str, str] = {"GET": "storage.objects.get", "DELETE": "storage.objects.delete"}


class Permissions:
    """What is denied, by bucket."""

    def __init__(self) -> None:
        self._denied: dict[str, Sequence[str]] = {}

    def deny(self, told: Json) -> None:
        """Deny permissions on buckets, and no others there.

        `storage.objects.list outside PREFIX` denies listings of other prefixes.
        """
        for bucket, permissions in told.items():
            if not isinstance(permissions, list):
                raise invalid(f"Not permissions: {permissions}")
            self._denied[bucket] = [str(one) for one in permissions]

    def check(self, request: Request) -> None:
        """Refuse a request whose permission is denied."""
        method = "GET" if request.method == "HEAD" else request.method
        match method, *request.segments:
            case "GET", "storage", "v1", "b", bucket:
                self.require(bucket, "storage.buckets.get")
            case "GET", "storage", "v1", "b", bucket, "o":
                self.require(bucket, _LIST)
                for prefix in self._listable(bucket):
                    if not request.query.get("prefix", "").startswith(prefix):
                        raise _denied(_LIST)
            case (("GET" | "DELETE"), ("storage" | "download"), *_, "b", bucket, "o", _):
                self.require(bucket, _OF_AN_OBJECT[method])
            # Whoever has a session's URL may go on with it.
            case "POST", "upload", "storage", "v1", "b", bucket, "o" if "upload_id" not in request.query:
                self.require(bucket, "storage.objects.create")
            case _:
                pass

    def require(self, bucket: str, permission: str) -> None:
        """Refuse, as Google words it, what takes a permission that is denied."""
        if permission in self._denied.get(bucket, ()):
            raise _denied(permission)

    def reveal_missing(self, bucket: str) -> None:
        """Refuse to say that an object is missing, where listing is denied."""
        if _LIST in self._denied.get(bucket, ()) or self._listable(bucket):
            raise _denied("storage.objects.get")

    def _listable(self, bucket: str) -> Sequence[str]:
        """Return the prefixes that alone may be listed."""
        return [
            one.removeprefix(_OUTSIDE) for one in self._denied.get(bucket, ()) if one.startswith(_OUTSIDE)
        ]


def _denied(permission: str) -> Refusal:
    return Refusal(
        403,
        "forbidden",
        f"job@project.iam.gserviceaccount.com does not have {permission} access to the Google Cloud "
        f"Storage bucket. Permission '{permission}' denied on resource (or it may not exist).",
    )
