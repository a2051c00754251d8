"""The error codes of S3 and of servers that speak its protocol: the error that each becomes, and its cure.

The codes are those of the S3 API reference ("Error responses"), of STS, and of the servers named beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloudckpt.backends.config.options import where_credentials_belong
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from cloudckpt.backends.system.printable import one_line

EXPIRED: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
    # MinIO and Ceph forget temporary keys when they expire. A rotated key is unknown in the same way.
    | {"InvalidTokenId", "InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException"}
)
"""Codes of credentials that were valid once: newer ones may be found where they came from."""
WRONG_CLOCK: Final = "RequestTimeTooSkewed"
WRONG_REGION: Final = frozenset(
    {"PermanentRedirect", "TemporaryRedirect"}
    | {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)

_LOG_IN: Final = where_credentials_belong("s3")
_SET_NEW: Final = f"Log in again or set new credentials; those of a role are renewed by botocore. {_LOG_IN}"
SET_THE_CLOCK: Final = "Set the clock of this machine by NTP or chrony (a container has its host's clock)"
_SET_THE_REGION: Final = "Set the option region{region}"
_SEND_A_CHECKSUM: Final = (
    "If the bucket demands a checksum (one with Object Lock does), set the option checksum to auto, "
    "crc64nvme or crc32c{checksum}"
)
_FREE_SPACE: Final = "Raise the quota, or delete older steps with `cloudckpt prune`"
_CHECK_THE_KEY: Final = "Check the option sse_kms_key_id, the bucket's default key, and that key's region"
_LONGEST: Final = 500
_LONGEST_END: Final = 200


@dataclass(frozen=True, slots=True)
class Meaning:
    """The error that a code becomes. Texts have the fields of ``str.format`` that ``s3_errors`` fills in."""

    error: type[CheckpointError]
    what: str
    cure: str = ""
    about_caller: bool = False
    """True of codes about the credentials, the account or the clock: every request gets the same answer."""
    of_writes: bool = False
    """True if the cure is for requests that write or delete: the code says little of others."""


def _each(codes: str, meaning: Meaning) -> Mapping[str, Meaning]:
    return dict.fromkeys(codes.split(), meaning)


_OF_CALLERS: Final[Mapping[str, Meaning]] = {
    WRONG_CLOCK: Meaning(StorageError, "{clock}", SET_THE_CLOCK, about_caller=True),
    **_each(
        "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired",
        Meaning(AccessDeniedError, "{endpoint} refused credentials that have expired", _SET_NEW, True),
    ),
    **_each(
        "InvalidToken InvalidTokenId",
        Meaning(
            AccessDeniedError,
            "{endpoint} refused the credentials: their session token is not valid",
            "Set the session token that belongs to the access key, or unset a stale AWS_SESSION_TOKEN. "
            f"{_SET_NEW}",
            True,
        ),
    ),
    **_each(
        "InvalidAccessKeyId InvalidClientTokenId UnrecognizedClientException",
        Meaning(
            AccessDeniedError,
            "{endpoint} refused the credentials: it does not know their access key",
            f"Check that they belong to this server, and that the key was not deleted. {_LOG_IN}",
            True,
        ),
    ),
    "SignatureDoesNotMatch": Meaning(
        AccessDeniedError,
        "{endpoint} refused the credentials: the signature does not match",
        "Check the secret access key (a blank or line break at its end, a key of another user), "
        f"and proxies that change headers or paths. {_LOG_IN}",
        True,
    ),
    **_each(
        "AuthFailure InvalidSecurity MissingSecurityHeader CredentialsNotSupported",
        Meaning(AccessDeniedError, "{endpoint} refused the credentials", _LOG_IN, True),
    ),
    **_each(
        "InvalidIdentityToken IDPRejectedClaim IDPCommunicationError",
        Meaning(
            AccessDeniedError,
            "STS refused the web identity token",
            "Check the file that AWS_WEB_IDENTITY_TOKEN_FILE names, and the role's trust policy",
            True,
        ),
    ),
    "RegionDisabledException": Meaning(
        AccessDeniedError,
        "STS is not enabled in this region for the account",
        "Enable the region in the account, or set AWS_REGION to one that is",
        True,
    ),
    "AccountProblem": Meaning(
        AccessDeniedError,
        "the account has a problem that stops its requests",
        "Look at the account's bills and messages, or ask the provider's support",
        True,
    ),
    "NotSignedUp": Meaning(
        AccessDeniedError,
        "the account is not signed up for S3",
        "Sign the account up for S3, or use credentials of one that is",
        True,
    ),
    # Ceph
    "UserSuspended": Meaning(
        AccessDeniedError,
        "the user of these credentials is suspended",
        "Ask the server's administrator to enable the user (radosgw-admin user enable)",
        True,
    ),
}
_OF_PLACES: Final[Mapping[str, Meaning]] = {
    "NoSuchBucket": Meaning(
        ObjectNotFoundError,
        "the bucket {bucket!r} does not exist",
        "Create it, or check its name, the region and the endpoint",
    ),
    "NoSuchAccessPoint": Meaning(
        ObjectNotFoundError,
        "the access point {bucket!r} does not exist",
        "Check its ARN or alias, and the region in it",
    ),
    "InvalidBucketName": Meaning(
        ConfigurationError,
        "the server refuses {bucket!r} as the name of a bucket",
        "Use 3 to 63 lower-case letters, digits, dots and dashes",
    ),
    **dict.fromkeys(
        WRONG_REGION, Meaning(StorageError, "the bucket {bucket!r} is in another region", _SET_THE_REGION)
    ),
    "AllAccessDisabled": Meaning(
        AccessDeniedError,
        "all access to the bucket {bucket!r} is disabled",
        "Check the bucket's name, or ask its owner or the provider's support why access is disabled",
    ),
    **_each(
        # Ceph, MinIO
        "QuotaExceeded XMinioAdminBucketQuotaExceeded XMinioStorageFull",
        Meaning(StorageError, "the quota of the bucket, the user or the server is used up", _FREE_SPACE),
    ),
    "InvalidObjectState": Meaning(
        StorageError,
        "the object is in an archived storage class, from which it can't be read",
        "Restore it first (aws s3api restore-object). Let no lifecycle rule move checkpoints to an archive",
    ),
    "InvalidStorageClass": Meaning(
        ConfigurationError, "the server does not know the storage class", "Check the option storage_class"
    ),
    **_each(
        "InvalidEncryptionAlgorithmError InvalidEncryptionMethod",
        Meaning(ConfigurationError, "the server does not know the encryption", "Check the option sse"),
    ),
}
_OF_REQUESTS: Final[Mapping[str, Meaning]] = {
    "NoSuchUpload": Meaning(
        StorageError, "the upload does not exist: it was completed, aborted or has expired"
    ),
    **_each(
        "BadDigest InvalidDigest XAmzContentChecksumMismatch",
        Meaning(IntegrityError, "the bytes that arrived are not those that were sent"),
    ),
    "PreconditionFailed": Meaning(
        PreconditionFailedError, "the object is there already, or is not the version expected"
    ),
    "InvalidRange": Meaning(IntegrityError, "the object ends before the bytes asked for"),
    "InvalidRequest": Meaning(
        StorageError, "{operation} failed with status {status}", _SEND_A_CHECKSUM, of_writes=True
    ),
    # MinIO
    "MissingContentMD5": Meaning(
        StorageError, "{operation} was refused for want of a checksum", _SEND_A_CHECKSUM, of_writes=True
    ),
    "EntityTooSmall": Meaning(
        StorageError, "a part is smaller than the server takes", "Raise the option part_size (5MiB or more)"
    ),
    "EntityTooLarge": Meaning(
        StorageError, "the request is larger than the server takes", "Lower the option part_size"
    ),
    **_each(
        "MethodNotAllowed NotImplemented",
        Meaning(
            StorageError,
            "{operation} failed with status {status}: the server does not support it",
            "`cloudckpt doctor {uri}` tells what the server supports",
        ),
    ),
    **_each(
        "ServiceUnavailable SlowDown",
        Meaning(
            StorageError,
            "{operation} failed with status {status}: the server is overloaded",
            "Lower the option concurrency, or raise the option retries",
        ),
    ),
}
_KMS: Final = "KMS."
_OF_KEYS: Final[Mapping[str, Meaning]] = {
    "KMS.DisabledException": Meaning(
        StorageError, "the KMS key is disabled", "Enable it, or choose another by sse_kms_key_id"
    ),
    **_each(
        "KMS.NotFoundException KMS.InvalidArnException KMS.InvalidKeyUsageException",
        Meaning(ConfigurationError, "the KMS key does not exist, or can't encrypt", _CHECK_THE_KEY),
    ),
    **_each(
        "KMS.InvalidStateException KMS.KMSInvalidStateException KMS.KeyUnavailableException",
        Meaning(
            StorageError,
            "the KMS key is not in a state to be used",
            "Cancel the key's deletion or finish its import, or choose another by sse_kms_key_id",
        ),
    ),
    **_each(
        "KMS.AccessDeniedException KMS.AccessDenied",
        Meaning(
            AccessDeniedError,
            "KMS denied the use of the key to {operation}",
            "The credentials need kms:GenerateDataKey and kms:Decrypt on the key, by its key policy too",
        ),
    ),
}
_OF_ANY_KEY: Final = Meaning(StorageError, "KMS refused the use of the key to {operation}", _CHECK_THE_KEY)
_MEANINGS: Final[Mapping[str, Meaning]] = {**_OF_CALLERS, **_OF_PLACES, **_OF_REQUESTS, **_OF_KEYS}
_BY_STATUS: Final[Mapping[int, str]] = {
    301: "PermanentRedirect",
    405: "MethodNotAllowed",
    412: "PreconditionFailed",
    416: "InvalidRange",
    501: "NotImplemented",
}
"""Codes that a status alone stands for, where the answer has no code or one that is not known."""


def meaning_of(code: str, status: int) -> Meaning | None:
    """Return the meaning of an answer, by its code or else its status; None where neither is known."""
    found = _MEANINGS.get(code)
    if found is None and code.startswith(_KMS):
        return _OF_ANY_KEY
    return found or _MEANINGS.get(_BY_STATUS.get(status, ""))


def is_known(code: str) -> bool:
    """Return True if the code has a meaning of its own, regardless of its status."""
    return code in _MEANINGS or code.startswith(_KMS)


def is_about_caller(code: str) -> bool:
    """Return True if the code is about the credentials, the account or the clock, for any request."""
    found = _MEANINGS.get(code)
    return found is not None and found.about_caller


def quoted(code: str, message: object) -> str:
    """Return code and message of a server on one line, control characters escaped, of bounded length.

    The middle of a long message is left out: AWS names the policy that denied a request at the end.
    """
    text = one_line(str(message or "").strip().rstrip("."))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - _LONGEST_END]} ... {text[-_LONGEST_END:]}"
    shown = one_line(code)[:_LONGEST_END]
    return f"{shown}: {text}" if text and text != shown else shown
