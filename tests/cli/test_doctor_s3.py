"""``cloudckpt doctor`` names what is wrong with a bucket of S3, on servers that really are so."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.as_aws import Policed, elsewhere, in_region, policed, punctual
from support.certificate import self_signed
from support.commands import options_of, run
from support.findings import ABORTED, HOUR, assert_only, by_check, doctor, failed, ruled
from support.places import Place
from support.proxy import AddHeaders, Answer, Delay, LoseAnswer, Proxy, Request, Spoiling, proxied
from support.servers import S3Server, moto_server, unused_port


@pytest.fixture
def on_moto(moto: S3Server) -> Place:
    """A place whose bucket has a lifecycle rule, as it should."""
    return ruled(Place.on_server(moto, moto.new_bucket()).child("run"), ABORTED)


@pytest.fixture(scope="module")
def law() -> Iterator[Policed]:
    with moto_server() as server, proxied(server.endpoint) as proxy:
        yield policed(server, proxy)


@pytest.fixture(scope="module")
def before_moto(moto: S3Server) -> Iterator[Proxy]:
    with proxied(moto.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(before_moto: Proxy) -> Proxy:
    before_moto.forget()
    return before_moto


def test_a_missing_bucket(moto: S3Server) -> None:
    status, found = doctor(Place.on_server(moto, "no-such-bucket").child("run"))
    assert status == 1
    assert_only(found, "bucket")
    assert "no-such-bucket" in found["bucket"]["what"] and "does not exist" in found["bucket"]["what"]
    assert found["the rest"]["state"] == "skipped" and "put" not in found


DENIED = {
    "s3:PutObject": (("put", "multipart"), "/run/*"),
    "s3:GetObject": (("get",), "/run/*"),
    "s3:ListBucket": (("list",), ""),
    "s3:AbortMultipartUpload": (("abort",), "/run/*"),
    "s3:ListBucketMultipartUploads": (("pending",), ""),
}


@pytest.mark.parametrize("action", DENIED)
def test_a_permission_that_is_missing_is_named_with_what_to_grant_it_on(law: Policed, action: str) -> None:
    bucket = law.root.new_bucket()
    seen = Place.on_server(law.root, bucket).child("run")
    with law.denying(action) as user:
        status, found = doctor(Place.on_server(user, bucket).child("run"))
    checks, resource = DENIED[action]
    assert status == 1
    assert_only(found, *checks)
    for check in checks:
        assert found[check]["action"] == f"{action} on arn:aws:s3:::{bucket}{resource}"
        assert found[check]["action"] in found[check]["advice"]
    # Who may not abort an upload completes it and deletes the object.
    assert found["clean-up"]["state"] == "ok"
    assert seen.visible() == seen.pending() == set()


def test_what_may_not_be_deleted_is_named(law: Policed) -> None:
    bucket = law.root.new_bucket()
    seen = Place.on_server(law.root, bucket).child("run")
    with law.denying("s3:DeleteObject") as user:
        status, found = doctor(Place.on_server(user, bucket).child("run"))
    assert status == 1
    # The store's own probe could not delete its object either: no other permission is asked for.
    denied = {finding["action"] for finding in found.values() if finding["action"]}
    assert denied == {f"s3:DeleteObject on arn:aws:s3:::{bucket}/run/*"}
    assert "delete" in failed(found)
    left = seen.visible()
    assert left and set(found["clean-up"]["what"].partition(": ")[2].split(", ")) == left
    assert "gc" in found["clean-up"]["advice"]
    assert seen.pending() == set()


@pytest.mark.parametrize(
    ("operation", "code", "check", "cure"),
    [
        ("PutObject", "QuotaExceeded", "put", "quota"),
        ("PutObject", "KMS.DisabledException", "put", "Enable it"),
        ("PutObject", "UserSuspended", "put", "user enable"),
        ("GetObject", "InvalidObjectState", "get", "Restore it"),
        ("CreateMultipartUpload", "AccountProblem", "multipart", "support"),
    ],
)
def test_a_403_that_no_permission_cures_has_its_own_advice(  # noqa: PLR0917 - fixtures
    on_moto: Place, proxy: Proxy, operation: str, code: str, check: str, cure: str
) -> None:
    proxy.rule(lambda request: Answer(403, code) if request.operation == operation else None)
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert status == 1
    assert code in found[check]["what"] and cure in found[check]["advice"]
    assert "Grant" not in found[check]["advice"] and not found[check]["action"]


def test_rules_that_may_not_be_looked_at_are_no_failure(law: Policed) -> None:
    bucket = law.root.new_bucket()
    with law.denying("s3:GetLifecycleConfiguration", "s3:GetBucketVersioning") as user:
        status, found = doctor(Place.on_server(user, bucket).child("run"))
    assert status == 0
    for check, action in (
        ("lifecycle", "s3:GetLifecycleConfiguration"),
        ("versions", "s3:GetBucketVersioning"),
    ):
        assert found[check]["state"] == "unknown"
        assert found[check]["action"] == f"{action} on arn:aws:s3:::{bucket}"


def test_the_key_that_encryption_takes_is_named_beside_the_permission(law: Policed) -> None:
    bucket = law.root.new_bucket()
    with law.denying("s3:PutObject") as user:
        place = Place.on_server(user, bucket).child("run")
        place.options.update({"sse": "aws:kms", "sse_kms_key_id": "the-key"})
        _, found = doctor(place)
    assert "kms:GenerateDataKey and kms:Decrypt on the-key" in found["put"]["action"]


@pytest.mark.parametrize(
    "rules",
    [
        (),
        (ABORTED | {"Status": "Disabled"},),
        (ABORTED | {"Filter": {"Prefix": "runs/"}},),
        ({"ID": "x", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 9}},),
    ],
    ids=["none", "disabled", "of another prefix", "of another kind"],
)
def test_no_lifecycle_rule_for_uploads(moto: S3Server, rules: tuple[dict[str, Any], ...]) -> None:
    place = Place.on_server(moto, moto.new_bucket()).child("run")
    status, found = doctor(ruled(place, *rules) if rules else place)
    assert status == 0
    assert found["lifecycle"]["state"] == "warning"
    assert "AbortIncompleteMultipartUpload" in found["lifecycle"]["advice"]
    assert ("expiry" in found) == ("Expiration" in str(rules))


def test_versions_that_are_kept(on_moto: Place, moto: S3Server) -> None:
    bucket = on_moto.uri.split("/")[2]
    moto.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    status, found = doctor(on_moto)
    assert (status, found["versions"]["state"]) == (0, "warning")
    ruled(on_moto, ABORTED, {**ABORTED, "ID": "old", "NoncurrentVersionExpiration": {"NoncurrentDays": 1}})
    assert doctor(on_moto)[1]["versions"]["state"] == "ok"


def test_encryption_that_is_kept_to_and_that_is_not(on_moto: Place, proxy: Proxy) -> None:
    on_moto.options["sse"] = "AES256"
    status, found = doctor(on_moto)
    assert (status, found["encryption"]["state"]) == (0, "ok") and "AES256" in found["encryption"]["what"]
    proxy.rule(lambda _: AddHeaders({"x-amz-server-side-encryption": "aws:kms"}))
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert status == 1
    assert_only(found, "encryption")


def test_a_wrong_region_that_requests_are_sent_on_from(on_moto: Place, proxy: Proxy) -> None:
    proxy.rule(in_region("eu-central-1"))
    place = on_moto.behind(proxy.endpoint)
    status, found = doctor(place)
    assert (status, found["region"]["state"]) == (0, "warning")
    assert "wrong region: the bucket is in eu-central-1" in found["region"]["what"]
    assert found["region"]["advice"] == "Set the option region=eu-central-1, or AWS_REGION=eu-central-1"
    place.options["region"] = "eu-central-1"
    assert doctor(place)[1]["region"]["state"] == "ok"


def test_a_wrong_region_that_nothing_leads_out_of(on_moto: Place, proxy: Proxy) -> None:
    proxy.rule(elsewhere("eu-central-1"))
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert status == 1
    assert_only(found, "region")
    assert "another region" in found["region"]["what"] and "eu-central-1" in found["region"]["advice"]
    assert "put" not in found


@pytest.mark.parametrize(("ahead", "way"), [(HOUR, "behind"), (-HOUR, "ahead of")])
def test_a_clock_that_is_off_by_an_hour(on_moto: Place, proxy: Proxy, ahead: float, way: str) -> None:
    proxy.clock = ahead
    proxy.rule(punctual(proxy))
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert status == 1
    assert_only(found, "clock")
    assert f"this machine's clock is 60 min {way} the server's" in found["clock"]["what"]
    assert "NTP" in found["clock"]["advice"] and "put" not in found


def test_a_clock_that_is_off_by_a_few_minutes(on_moto: Place, proxy: Proxy) -> None:
    proxy.clock = 300.0
    proxy.rule(punctual(proxy))
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert (status, found["clock"]["state"], found["put"]["state"]) == (0, "warning", "ok")
    assert "5 min behind" in found["clock"]["what"]


def test_a_server_that_ignores_conditions(rclone: S3Server) -> None:
    place = Place.on_server(rclone, rclone.new_bucket()).child("run")
    status, found = doctor(place)
    assert (status, found["conditions"]["state"]) == (0, "warning")
    assert "does not support the condition" in found["conditions"]["what"]
    assert place.visible() == place.pending() == set()


def test_a_server_that_checks_checksums(s3_server_named: Callable[[str], S3Server]) -> None:
    server = s3_server_named("ministack")
    status, found = doctor(Place.on_server(server, server.new_bucket()).child("run"))
    assert (status, found["checksum"]["state"]) == (0, "ok")
    assert "wrong crc64nvme is refused" in found["checksum"]["what"]


def test_a_server_that_takes_wrong_checksums_which_were_asked_for(on_moto: Place) -> None:
    on_moto.options["checksum"] = "crc32c"
    status, found = doctor(on_moto)
    assert (status, found["checksum"]["state"]) == (0, "warning")


def test_credentials_that_are_refused_or_not_there(rclone: S3Server, on_moto: Place) -> None:
    place = Place.on_server(rclone, rclone.new_bucket()).child("run")
    place.options["storage_options"] = {"key": "wrong", "secret": "canary"}
    ran = run("doctor", place.uri, "--json", place=place)
    assert ran.status == 1 and "canary" not in ran.out + ran.err
    assert_only(by_check(ran), "credentials")
    del on_moto.options["storage_options"]
    status, found = doctor(on_moto)
    assert status == 1
    assert_only(found, "credentials")
    assert "found" in found["credentials"]["what"]


@pytest.mark.parametrize(
    ("expiry", "state"),
    [("2020-01-01T00:00:00Z", "failed"), (None, "warning"), ("2099-01-01T00:00:00Z", "ok")],
)
def test_temporary_credentials(
    on_moto: Place, expiry: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del on_moto.options["storage_options"]
    given = {"AWS_ACCESS_KEY_ID": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "AWS_SESSION_TOKEN": "canary"}
    given |= {} if expiry is None else {"AWS_CREDENTIAL_EXPIRATION": expiry}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ran = run("doctor", on_moto.uri, "--json", place=on_moto)
    assert by_check(ran)["credentials"]["state"] == state
    assert "canary" not in ran.out


def test_an_endpoint_that_nobody_listens_at_or_whose_name_nobody_knows(on_moto: Place) -> None:
    on_moto.options["endpoint_url"] = f"http://127.0.0.1:{unused_port()}"
    status, found = doctor(on_moto)
    assert status == 1
    assert_only(found, "connection")
    on_moto.options["endpoint_url"] = "http://s3.nowhere.invalid"
    status, found = doctor(on_moto)
    assert status == 1
    assert_only(found, "name")
    assert "s3.nowhere.invalid" in found["name"]["what"]


def test_tls_that_is_not_spoken_not_trusted_and_trusted(
    on_moto: Place, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_moto.options["endpoint_url"] = moto.endpoint.replace("http://", "https://")
    _, found = doctor(on_moto)
    assert_only(found, "connection")
    assert "does not speak TLS" in found["connection"]["what"]
    context, trusted = self_signed(tmp_path)
    with proxied(moto.endpoint, context) as proxy:
        place = on_moto.behind(proxy.endpoint)
        _, found = doctor(place)
        assert_only(found, "connection")
        assert "certificate" in found["connection"]["what"]
        for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
            with monkeypatch.context() as environment:
                environment.setenv(variable, str(trusted))
                status, found = doctor(place)
            assert status == 0 and "TLS" in found["connection"]["what"]


def test_rules_that_are_not_told_stop_nothing(on_moto: Place, proxy: Proxy) -> None:
    def decide(request: Request) -> Spoiling:
        return LoseAnswer() if request.target.endswith("?lifecycle") else None

    proxy.rule(decide)
    on_moto.options["retries"] = 0
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert (status, found["settings"]["state"], found["delete"]["state"]) == (0, "unknown", "ok")
    assert on_moto.visible() == on_moto.pending() == set()


def test_an_upload_whose_beginning_was_not_answered_does_not_stay(on_moto: Place, proxy: Proxy) -> None:
    proxy.rule(lambda request: LoseAnswer() if request.operation == "CreateMultipartUpload" else None)
    on_moto.options["retries"] = 0
    status, found = doctor(on_moto.behind(proxy.endpoint))
    assert status == 1
    assert failed(found)[0] == "multipart" and found["clean-up"]["state"] == "ok"
    assert on_moto.visible() == on_moto.pending() == set()


def test_a_proxy_that_is_not_there_is_named_without_its_password(
    on_moto: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = unused_port()
    monkeypatch.setenv("http_proxy", f"http://me:canary@127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    ran = run("doctor", on_moto.uri, "--json", place=on_moto)
    assert ran.status == 1 and "canary" not in ran.out + ran.err
    found = by_check(ran)
    assert_only(found, "connection")
    told = f"the proxy http://127.0.0.1:{port} (http_proxy) refused the connection"
    assert found["connection"]["what"] == told
    assert "unset http_proxy" in found["connection"]["advice"]
    assert found["proxy"]["state"] == "ok"
    assert f"http://127.0.0.1:{port} (http_proxy)" in found["proxy"]["what"]


def test_a_profile_that_is_not_there_is_a_misuse(on_moto: Place) -> None:
    on_moto.options["profile"] = "nobody's"
    ran = run("doctor", on_moto.uri, "--json", place=on_moto)
    assert (ran.status, ran.out) == (2, "") and "profile" in ran.err


def test_ctrl_c_in_the_middle_of_a_request_leaves_nothing(on_moto: Place, proxy: Proxy) -> None:
    begun = threading.Event()

    def decide(request: Request) -> Spoiling:
        if request.operation != "CreateMultipartUpload":
            return None
        begun.set()
        return Delay(2.0)  # the server acts at once

    proxy.rule(decide)
    place = on_moto.behind(proxy.endpoint)
    command = [sys.executable, "-m", "cloudckpt.cli", "doctor", place.uri, *options_of(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert begun.wait(60)
        while not place.pending():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, complaint = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in complaint and "multipart" not in printed
    assert place.visible() == place.pending() == set()
