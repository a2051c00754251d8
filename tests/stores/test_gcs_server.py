"""The tests' own Google Cloud Storage keeps the real one's rules: else to pass against it proves nothing.

Whatever both speak is asked of an emulator of somebody else too. Where the two differ, `_DIFFERENCES` says
what the emulator does, and what Google does by its documentation and its own clients.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import crc32c
import pytest

import support.gcs_server
from support.gcs_emulator import gcs_emulator
from support.servers import served_by

_QUANTUM = 262144
_TESTS = Path(support.gcs_server.__file__).parent.parent

# gcp-storage-emulator …; Google …
_DIFFERENCES: Mapping[str, str] = {
    "test_a_read_tells_its_generation": "sends no x-goog-generation with the bytes; Google does",
    "test_a_slash_in_a_name_is_escaped_or_the_path_is_another": "takes a bare slash; Google wants it escaped",
    "test_a_name_that_no_object_can_have_is_refused": (
        "takes '.', a line break and 1026 bytes, breaks down at '' and '..'; Google refuses each of them"
    ),
    "test_the_last_bytes": "answers bytes=-3 with the whole object; Google with three bytes",
    "test_a_range_past_the_end_is_refused": "answers 206 and no bytes; Google 416",
    "test_an_error_is_told_as_google_tells_it": "answers 404 without a body; Google tells the error in JSON",
    "test_where_lines_end_with_lf_a_cr_before_the_boundary_is_data": (
        "loses the CR; Google documents CRLF alone, and ours goes by how the first line ends, as gcsfs writes"
    ),
    "test_a_boundary_in_the_data_is_refused": "ignores what follows the second part; Google wants two parts",
    "test_a_checksum_may_come_as_a_header": "ignores x-goog-hash in a request; Google refuses a wrong one",
    "test_head_has_the_length_and_no_body": "not spoken: 501 to HEAD; Google documents it for XML alone",
    "test_a_put_wants_its_generation": "ignores preconditions of puts; Google answers 412",
    "test_one_of_many_creates": "ignores preconditions, so that all of them create; Google lets one",
    "test_a_read_wants_its_generation": "ignores generation and preconditions of reads; Google doesn't",
    "test_a_delete_wants_its_generation": "ignores preconditions of deletions; Google answers 412",
    "test_a_session_is_refused_at_its_start_and_at_its_end": "ignores preconditions; Google doesn't",
    "test_a_session_that_holds_nothing_tells_no_range": "tells bytes=0-0, one byte; Google sends no Range",
    "test_a_session_that_has_ended_tells_its_object": "answers 404; Google 200 and the object",
    "test_a_size_that_is_not_held_ends_nothing": "ends at a smaller size, and cuts what it holds; Google 308",
    "test_a_chunk_that_does_not_fit_is_refused": (
        "takes any length, and what it can't read for the whole; Google wants multiples of 256 KiB that fit"
    ),
    "test_a_chunk_that_would_leave_a_gap_is_refused": "answers 400; Google 503 and, for once, plain text",
    "test_an_announced_size_is_kept_to": "ignores what was announced; Google documents neither",
    "test_bytes_that_are_held_are_skipped": "refuses them; Google ignores what it has persisted already",
    "test_a_broken_chunk_leaves_whole_multiples": (
        "keeps every byte that came; Google is reported to keep multiples, and documents that Range tells"
    ),
    "test_a_cancelled_session_is_gone": "not spoken: 501 to a session's DELETE; Google answers 499",
    "test_offsets_bound_a_listing": "ignores startOffset and endOffset; Google doesn't",
    "test_what_is_empty_is_left_out": "lists no items and no prefixes; Google leaves both out",
    "test_pages_add_up": "ignores maxResults, and has one page; Google keeps to it",
    "test_a_token_of_no_page_is_refused": "ignores pageToken; Google refuses a wrong one",
    "test_a_deletion_is_answered_with_no_content": "answers 200, though 204 in a batch; Google 204",
    "test_a_requester_pays": "ignores billing and userProject; Google refuses who names no project",
    "test_what_is_composed_counts_its_components_and_has_no_md5": (
        "gives no componentCount, an MD5, and the size as a number; Google a count, no MD5, and a string"
    ),
    "test_composing_wants_its_generations": "ignores generations and preconditions; Google doesn't",
    "test_only_so_many_are_composed": "composes none and 33; Google from 1 to 32",
    "test_rewriting_wants_its_generations": "ignores preconditions of both objects; Google answers 412",
    "test_each_answer_names_its_call": "sends no Content-ID; Google sends the call's, after response-",
    "test_a_batch_may_read": "not spoken: 404 to every GET in a batch; Google makes it",
    "test_a_batch_holds_a_hundred_calls": "takes any number; Google no more than 100",
}


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        return str(self.json["error"]["errors"][0]["reason"])


@dataclass(slots=True)
class _Client:
    """Requests on one connection, each in a bucket of its own."""

    address: str
    bucket: str
    headers: dict[str, str] = field(default_factory=dict)
    _connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection(self.address, timeout=30)

    def close(self) -> None:
        self._connection.close()

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **query: Any,
    ) -> _Answer:
        if query:
            path += f"?{urlencode(query)}"
        try:
            self._connection.request(method, path, body, {**self.headers, **(headers or {})})
            answer = self._connection.getresponse()
            return _Answer(answer.status, answer.headers, answer.read())
        except OSError:
            self._connection.close()
            raise

    def tell(self, what: str, told: object = None) -> Any:
        body = None if told is None else json.dumps(told).encode()
        answer = self.ask("GET" if body is None else "POST", f"/_gcs/{what}", body)
        assert answer.status == 200, answer
        return answer.json

    def make(self, **resource: object) -> _Answer:
        return self.post("/storage/v1/b", {"name": self.bucket, **resource}, project="p")

    def post(
        self, path: str, told: object, headers: Mapping[str, str] | None = None, **query: Any
    ) -> _Answer:
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.ask("POST", path, json.dumps(told).encode(), headers, **query)

    def of(self, method: str, name: str, **query: Any) -> _Answer:
        return self.ask(method, self.path(name), **query)

    def path(self, name: str = "") -> str:
        return f"/storage/v1/b/{self.bucket}/o" + (f"/{quote(name, safe='')}" if name else "")

    def read(self, name: str, span: str | None = None) -> _Answer:
        headers = {} if span is None else {"Range": f"bytes={span}"}
        return self.ask("GET", f"/download{self.path(name)}", headers=headers, alt="media")

    def put(self, name: str, data: bytes, headers: Mapping[str, str] | None = None, **query: Any) -> _Answer:
        query = {"uploadType": "media", "name": name, **query}
        return self.ask("POST", f"/upload{self.path()}", data, headers, **query)

    def put_both(
        self, resource: Mapping[str, object], data: bytes, line: bytes = b"\r\n", **query: Any
    ) -> _Answer:
        pieces = [
            b"--=x=",
            b"Content-Type: application/json; charset=UTF-8",
            b"",
            json.dumps(resource).encode(),
        ]
        pieces += [b"--=x=", b"Content-Type: text/plain", b"", data, b"--=x=--"]
        headers = {"Content-Type": 'multipart/related; boundary="=x="'}
        query = {"uploadType": "multipart", **query}
        return self.ask("POST", f"/upload{self.path()}", line.join(pieces), headers, **query)

    def start(self, name: str, resource: Mapping[str, object] | None = None, **query: Any) -> str:
        answer = self.try_start(name, resource, **query)
        assert answer.status == 200, answer
        url = urlsplit(answer.headers["Location"])
        assert url.netloc == self.address
        return f"{url.path}?{url.query}"

    def try_start(
        self, name: str, resource: Mapping[str, object] | None = None, length: int | None = None, **query: Any
    ) -> _Answer:
        told = {"name": name, **(resource or {})}
        headers = {} if length is None else {"X-Upload-Content-Length": str(length)}
        return self.post(f"/upload{self.path()}", told, headers, uploadType="resumable", **query)

    def send(self, session: str, span: str | None, data: bytes = b"") -> _Answer:
        return self.ask("PUT", session, data, {} if span is None else {"Content-Range": f"bytes {span}"})


_Connect = Callable[..., _Client]


@contextlib.contextmanager
def _served(*options: str) -> Iterator[str]:
    def command(port: int) -> list[str]:
        program = [sys.executable, "-m", "support.gcs_server", "--port", str(port)]
        return ["env", f"PYTHONPATH={_TESTS}", *program, *options]

    with served_by("gcs", command) as server:
        yield urlsplit(server.endpoint).netloc


@pytest.fixture(scope="module")
def own_address() -> Iterator[str]:
    with _served() as running:
        yield running


@pytest.fixture(scope="module")
def emulator_address() -> Iterator[str]:
    with gcs_emulator() as endpoint:
        yield urlsplit(endpoint).netloc


@pytest.fixture
def connect() -> Iterator[_Connect]:
    """Return a maker of clients, which are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connected(address: str, bucket: str = "") -> _Client:
            bucket = bucket or f"bucket-{uuid.uuid4().hex[:12]}"
            return stack.enter_context(contextlib.closing(_Client(address, bucket)))

        yield connected


@pytest.fixture(params=["own", "emulator"])
def client(request: pytest.FixtureRequest, connect: _Connect) -> _Client:
    """Ask each of the servers, in a new bucket."""
    asking = connect(request.getfixturevalue(f"{request.param}_address"))
    assert asking.make().status == 200
    # Applied last: a server that makes no bucket is an error, not a difference.
    if request.param == "emulator" and request.node.originalname in _DIFFERENCES:
        reason = _DIFFERENCES[request.node.originalname]
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    return asking


@pytest.fixture
def own(own_address: str, connect: _Connect) -> Iterator[_Client]:
    """Ask our server alone: at its door for tests, or for what it refuses because it doesn't serve it."""
    asking = connect(own_address)
    assert asking.make().status == 200
    yield asking
    asking.tell("faults", [])


def _crc(data: bytes) -> str:
    return base64.b64encode(crc32c.crc32c(data).to_bytes(4, "big")).decode()


def _held(answer: _Answer) -> str | None:
    assert answer.status == 308, answer
    return answer.headers.get("Range")


class TestObjects:
    def test_an_object_is_read_as_it_was_put(self, client: _Client) -> None:
        name = "a run/ü%2F\U0001f600+?#"
        put = client.put(name, b"hello", {"Content-Type": "text/x"}).json
        assert client.of("GET", name).json == put
        assert put["name"] == name and put["size"] == "5" and put["crc32c"] == "mnG7TA=="
        assert put["md5Hash"] == "XUFAKrxLKna5cZ2REBfFkg==" and put["contentType"] == "text/x"
        read = client.read(name)
        assert (read.status, read.body) == (200, b"hello")
        assert read.headers["x-goog-hash"] == f"crc32c={put['crc32c']},md5={put['md5Hash']}"
        assert client.ask("GET", client.path(name), alt="media").body == b"hello"

    def test_a_resource_says_whose_it_is(self, client: _Client) -> None:
        put = client.put("a/b", b"hello").json
        assert (put["kind"], put["bucket"], put["storageClass"]) == (
            "storage#object",
            client.bucket,
            "STANDARD",
        )
        assert put["id"] == f"{client.bucket}/a/b/{put['generation']}" and put["metageneration"] == "1"
        assert put["etag"] and put["timeCreated"] == put["updated"]
        assert datetime.fromisoformat(put["timeCreated"]).tzinfo is not None
        assert client.ask("GET", client.path()).json["items"] == [put]

    def test_a_read_tells_its_generation(self, client: _Client) -> None:
        generation = client.put("g", b"hello").json["generation"]
        assert client.read("g").headers["x-goog-generation"] == generation

    def test_a_slash_in_a_name_is_escaped_or_the_path_is_another(self, client: _Client) -> None:
        client.put("a/b", b"x")
        assert client.ask("GET", f"/storage/v1/b/{client.bucket}/o/a/b").status == 404

    @pytest.mark.parametrize("name", ["", ".", "..", "a\nb", "é" * 513])
    def test_a_name_that_no_object_can_have_is_refused(self, client: _Client, name: str) -> None:
        assert client.put(name, b"x").status == 400
        assert client.try_start(name).status == 400

    def test_the_bytes_of_a_range(self, client: _Client) -> None:
        client.put("r", b"0123456789")
        for span, body, shown in (("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("8-99", b"89", "8-9")):
            read = client.read("r", span)
            assert (read.status, read.body) == (206, body)
            assert read.headers["Content-Range"] == f"bytes {shown}/10"

    def test_the_last_bytes(self, client: _Client) -> None:
        client.put("r", b"0123456789")
        read = client.read("r", "-3")
        assert (read.status, read.body, read.headers["Content-Range"]) == (206, b"789", "bytes 7-9/10")

    def test_a_range_past_the_end_is_refused(self, client: _Client) -> None:
        client.put("r", b"0123456789")
        assert client.read("r", "10-12").status == 416

    def test_what_is_missing_is_not_found(self, client: _Client) -> None:
        assert client.of("GET", "none").status == client.read("none").status == 404
        assert client.of("DELETE", "none").status == 404
        client.bucket = "bucket-none"
        assert client.put("x", b"x").status == client.try_start("x").status == 404
        assert client.ask("GET", client.path()).status == 404

    def test_an_error_is_told_as_google_tells_it(self, client: _Client) -> None:
        error = client.of("GET", "none").json["error"]
        assert error["code"] == 404 and error["errors"][0]["reason"] == "notFound"
        assert error["errors"][0]["domain"] == "global" and error["message"]

    @pytest.mark.parametrize(
        ("line", "data"), [(b"\r\n", b"\n--=x\r\n\r\n"), (b"\r\n", b""), (b"\n", b"\n--=x\r\n\n")]
    )
    def test_both_parts_of_a_multipart_body_arrive(self, client: _Client, line: bytes, data: bytes) -> None:
        put = client.put_both({"name": "m", "metadata": {"k": "v"}}, data, line)
        assert put.status == 200 and put.json["metadata"] == {"k": "v"}
        assert put.json["contentType"] == "text/plain"
        assert client.read("m").body == data

    def test_where_lines_end_with_lf_a_cr_before_the_boundary_is_data(self, client: _Client) -> None:
        client.put_both({"name": "m"}, b"\r\n\r", b"\n")
        assert client.read("m").body == b"\r\n\r"

    def test_a_boundary_in_the_data_is_refused(self, client: _Client) -> None:
        assert client.put_both({"name": "m"}, b"a\r\n--=x=\r\nb").status == 400
        longer = (
            b'--x\nContent-Type: application/json\n\n{"name": "m"}\n--xy\nContent-Type: a/b\n\ndata\n--x--'
        )
        headers = {"Content-Type": "multipart/related; boundary=x"}
        assert (
            client.ask("POST", f"/upload{client.path()}", longer, headers, uploadType="multipart").status
            == 400
        )
        assert client.of("GET", "m").status == 404

    @pytest.mark.parametrize("wrong", [{"crc32c": _crc(b"b")}, {"md5Hash": "XUFAKrxLKna5cZ2REBfFkg=="}])
    def test_bytes_with_another_checksum_never_appear(self, client: _Client, wrong: dict[str, str]) -> None:
        assert client.put_both({"name": "s", **wrong}, b"a").status == 400
        session = client.start("s", wrong)
        assert client.send(session, "0-0/1", b"a").status == 400
        assert client.of("GET", "s").status == 404

    def test_a_checksum_may_come_as_a_header(self, client: _Client) -> None:
        assert client.put("s", b"a", {"x-goog-hash": f"crc32c={_crc(b'b')}"}).status == 400
        assert client.put("s", b"a", {"x-goog-hash": "crc32c=hm"}).status == 400
        assert client.put("s", b"a", {"x-goog-hash": f"crc32c={_crc(b'a')}"}).status == 200

    def test_a_resumable_upload_answers_with_the_right_checksum(self, client: _Client) -> None:
        data = bytes(range(256)) * 2048
        session = client.start("s", {"crc32c": _crc(data)})
        client.send(session, f"0-{_QUANTUM - 1}/*", data[:_QUANTUM])
        ended = client.send(session, f"{_QUANTUM}-{len(data) - 1}/{len(data)}", data[_QUANTUM:])
        assert ended.json["crc32c"] == _crc(data)

    def test_md5_is_left_out_if_told(self, connect: _Connect) -> None:
        with _served("--no-md5") as address:
            client = connect(address)
            client.make()
            assert "md5Hash" not in client.put("m", b"hello").json
            assert client.read("m").headers["x-goog-hash"] == "crc32c=mnG7TA=="
            given = {"x-goog-hash": "md5=XUFAKrxLKna5cZ2REBfFkg=="}
            assert client.put("m", b"hello", given).json["md5Hash"] == "XUFAKrxLKna5cZ2REBfFkg=="

    def test_large_bodies_survive(self, client: _Client) -> None:
        data = bytes(range(251)) * 20000
        assert client.put("large", data).json["crc32c"] == _crc(data)
        assert client.read("large").body == data
        assert client.read("large", "1000000-3000000").body == data[1000000:3000001]
        assert client.put_both({"name": "large"}, data).json["crc32c"] == _crc(data)

    def test_head_has_the_length_and_no_body(self, client: _Client) -> None:
        client.put("h", b"hello")
        answer = client.of("HEAD", "h", alt="media")
        assert answer.headers["Content-Length"] == "5" and not answer.body
        assert client.read("h").body == b"hello"


class TestPreconditions:
    def test_generations_grow(self, client: _Client) -> None:
        generations = [int(client.put("g", b"x").json["generation"]) for _ in range(5)]
        assert generations == sorted(set(generations))

    def test_a_put_wants_its_generation(self, client: _Client) -> None:
        first = client.put("p", b"1", ifGenerationMatch=0).json["generation"]
        refused = client.put("p", b"2", ifGenerationMatch=0)
        assert refused.status == 412 and refused.reason == "conditionNotMet"
        assert client.put_both({"name": "p"}, b"2", ifGenerationMatch=0).status == 412
        assert client.put("p", b"2", ifGenerationNotMatch=first).status == 412
        assert client.put("new", b"2", ifGenerationNotMatch=0).status == 412
        assert client.read("p").body == b"1"
        assert client.put("p", b"3", ifGenerationMatch=first).status == 200
        assert client.put("p", b"4", ifGenerationMatch=first).status == 412
        assert client.put("p", b"5", ifGenerationMatch="x").status == 400

    def test_one_of_many_creates(self, client: _Client, connect: _Connect) -> None:
        statuses: list[int] = []

        def create() -> None:
            asking = connect(client.address, client.bucket)
            statuses.append(asking.put("one", b"x" * 100000, ifGenerationMatch=0).status)

        threads = [threading.Thread(target=create) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] + [412] * 7

    def test_a_read_wants_its_generation(self, client: _Client) -> None:
        old = client.put("p", b"1").json["generation"]
        new = client.put("p", b"2").json["generation"]
        assert client.of("GET", "p", generation=old).status == 404
        assert client.of("GET", "p", generation=new).status == 200
        assert client.of("GET", "p", ifGenerationMatch=old).status == 412
        unchanged = client.of("GET", "p", ifGenerationNotMatch=new)
        assert unchanged.status == 304 and not unchanged.body
        assert client.of("GET", "p", ifGenerationNotMatch=old).status == 200

    def test_a_delete_wants_its_generation(self, client: _Client) -> None:
        old = client.put("p", b"1").json["generation"]
        new = client.put("p", b"2").json["generation"]
        assert client.of("DELETE", "p", ifGenerationMatch=old).status == 412
        assert client.of("DELETE", "p", ifGenerationNotMatch=new).status == 412
        assert client.of("DELETE", "p", ifGenerationMatch=new).status == 204
        assert client.of("GET", "p").status == 404

    def test_a_session_is_refused_at_its_start_and_at_its_end(self, client: _Client) -> None:
        session = client.start("p", ifGenerationMatch=0)
        client.put("p", b"1")
        assert client.try_start("p", ifGenerationMatch=0).status == 412
        assert client.send(session, "0-0/1", b"2").status == 412
        assert client.send(session, "*/1").status == 412
        assert client.read("p").body == b"1"


class TestSessions:
    def test_chunks_become_an_object_at_their_end(self, client: _Client) -> None:
        session = client.start("s", {"metadata": {"k": "v"}})
        assert (
            _held(client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)) == f"bytes=0-{_QUANTUM - 1}"
        )
        assert _held(client.send(session, "*/*")) == f"bytes=0-{_QUANTUM - 1}"
        assert _held(client.send(session, f"*/{_QUANTUM + 3}")) == f"bytes=0-{_QUANTUM - 1}"
        assert client.of("GET", "s").status == 404
        ended = client.send(session, f"{_QUANTUM}-{_QUANTUM + 2}/{_QUANTUM + 3}", b"end")
        assert ended.status == 200 and ended.json["metadata"] == {"k": "v"}
        assert client.read("s").body == b"a" * _QUANTUM + b"end"

    def test_a_session_that_holds_nothing_tells_no_range(self, client: _Client) -> None:
        assert _held(client.send(client.start("s"), "*/*")) is None

    def test_a_session_that_has_ended_tells_its_object(self, client: _Client) -> None:
        session = client.start("s")
        ended = client.send(session, "0-2/3", b"end")
        client.of("DELETE", "s")
        for span, data in (("*/3", b""), ("*/*", b""), ("*/4", b""), ("0-2/3", b"end"), ("0-3/4", b"more")):
            again = client.send(session, span, data)
            assert (again.status, again.json) == (200, ended.json)

    def test_a_known_size_ends_what_is_held(self, client: _Client) -> None:
        session = client.start("s")
        client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        assert client.send(session, f"*/{_QUANTUM}").status == 200
        assert client.send(client.start("empty"), "*/0").json["size"] == "0"

    def test_a_size_that_is_not_held_ends_nothing(self, client: _Client) -> None:
        session = client.start("s")
        client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        for size in (_QUANTUM + 1, _QUANTUM - 1, 0):
            assert _held(client.send(session, f"*/{size}")) == f"bytes=0-{_QUANTUM - 1}"
        assert client.of("GET", "s").status == 404

    def test_a_body_without_a_range_is_the_whole(self, client: _Client) -> None:
        session = client.start("s")
        assert client.send(session, None, b"whole").status == 200
        assert client.read("s").body == b"whole"

    @pytest.mark.parametrize(
        ("span", "size"),
        [
            ("0-99/*", 100),
            ("0-99/200", 100),
            ("0-99/100", 99),
            ("0-99/50", 100),
            ("bits", 0),
        ],
    )
    def test_a_chunk_that_does_not_fit_is_refused(self, client: _Client, span: str, size: int) -> None:
        session = client.start("s")
        assert client.send(session, span, b"x" * size).status == 400
        assert client.send(session, "0-4/5", b"whole").status == 200
        assert client.read("s").body == b"whole"

    @pytest.mark.parametrize(("span", "size"), [(f"{_QUANTUM}-{2 * _QUANTUM - 1}/*", _QUANTUM), ("1-5/6", 5)])
    def test_a_chunk_that_would_leave_a_gap_is_refused(self, client: _Client, span: str, size: int) -> None:
        session = client.start("s")
        refusal = client.send(session, span, b"x" * size)
        assert refusal.status == 503 and b"exceeds already uploaded size of 0 byte(s)" in refusal.body
        assert refusal.headers.get_content_type() == "text/plain"
        assert client.send(session, "0-4/5", b"whole").status == 200
        assert client.read("s").body == b"whole"

    def test_a_chunk_that_ends_before_it_begins_is_refused(self, client: _Client) -> None:
        session = client.start("s")
        assert client.send(session, "5-3/*").status == 400
        assert client.send(session, "0-4/5", b"whole").status == 200

    def test_an_announced_size_is_kept_to(self, client: _Client) -> None:
        session = client.start("s", length=3)
        assert client.send(session, "0-3/4", b"abcd").status == 400
        assert client.send(session, "0-2/3", b"abc").status == 200

    def test_bytes_that_are_held_are_skipped(self, client: _Client) -> None:
        session = client.start("s")
        client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        again = client.send(session, f"0-{_QUANTUM - 1}/*", b"b" * _QUANTUM)
        assert _held(again) == f"bytes=0-{_QUANTUM - 1}"
        size = 2 * _QUANTUM
        assert client.send(session, f"0-{size - 1}/{size}", b"c" * size).status == 200
        assert client.read("s").body == b"a" * _QUANTUM + b"c" * _QUANTUM

    def test_a_broken_chunk_leaves_whole_multiples(self, client: _Client) -> None:
        session = client.start("s")
        host, _, port = client.address.partition(":")
        size = 3 * _QUANTUM
        head = f"PUT {session} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
        head += f"Content-Range: bytes 0-{size - 1}/{size}"
        with socket.create_connection((host, int(port))) as broken:
            broken.sendall(f"{head}\r\n\r\n".encode() + b"a" * (2 * _QUANTUM + 5))
            broken.shutdown(socket.SHUT_WR)
            # The server has seen the end when it ends the connection itself.
            with contextlib.suppress(ConnectionResetError):
                while broken.recv(4096):
                    pass
        assert _held(client.send(session, "*/*")) == f"bytes=0-{2 * _QUANTUM - 1}"
        assert client.of("GET", "s").status == 404

    def test_a_cancelled_session_is_gone(self, client: _Client) -> None:
        session = client.start("s")
        assert client.ask("DELETE", session).status == 499
        assert client.send(session, "*/*").status == client.send(session, None, b"x").status == 410
        assert client.ask("DELETE", session).status == 410
        assert client.send(session + "x", "*/*").status == 404

    def test_open_sessions_are_told(self, own: _Client) -> None:
        def mine() -> Sequence[object]:
            return [each for each in own.tell("sessions")["open"] if each["bucket"] == own.bucket]

        session = own.start("s")
        own.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        assert mine() == [{"bucket": own.bucket, "name": "s", "held": _QUANTUM}]
        own.send(session, f"*/{_QUANTUM}")
        assert mine() == []


def _joined(pages: Sequence[tuple[list[str], list[str]]]) -> tuple[list[str], list[str]]:
    return [name for items, _ in pages for name in items], [name for _, found in pages for name in found]


class TestListing:
    NAMES = ("a/1", "a/2", "a/b/3", "a0", "b", "é", "\uffff", "\U0001f600")

    def _pages(self, client: _Client, **query: Any) -> list[tuple[list[str], list[str]]]:
        pages = []
        while True:
            page = client.ask("GET", client.path(), **query).json
            pages.append(([item["name"] for item in page.get("items", [])], page.get("prefixes", [])))
            if "nextPageToken" not in page:
                return pages
            query["pageToken"] = page["nextPageToken"]

    @pytest.fixture
    def full(self, client: _Client) -> _Client:
        for name in reversed(self.NAMES):
            client.put(name, b"x")
        return client

    def test_names_come_in_the_order_of_their_bytes(self, full: _Client) -> None:
        assert self._pages(full) == [(sorted(self.NAMES, key=str.encode), [])]
        assert self._pages(full, prefix="a/") == [(["a/1", "a/2", "a/b/3"], [])]
        assert self._pages(full, prefix="none") == [([], [])]

    def test_offsets_bound_a_listing(self, full: _Client) -> None:
        assert self._pages(full, startOffset="b", endOffset="\uffff") == [(["b", "é"], [])]
        assert self._pages(full, delimiter="/", endOffset="é") == [(["a0", "b"], ["a/"])]

    def test_what_is_empty_is_left_out(self, client: _Client) -> None:
        assert client.ask("GET", client.path()).json == {"kind": "storage#objects"}

    def test_a_delimiter_folds(self, full: _Client) -> None:
        assert self._pages(full, delimiter="/") == [(["a0", "b", "é", "\uffff", "\U0001f600"], ["a/"])]
        assert self._pages(full, delimiter="/", prefix="a/") == [(["a/1", "a/2"], ["a/b/"])]

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_pages_add_up(self, full: _Client, size: int) -> None:
        full.put("a/", b"x")
        pages = self._pages(full, maxResults=size, delimiter="/")
        assert [len(items) + len(prefixes) for items, prefixes in pages] == [size] * (6 // size)
        assert _joined(pages) == (sorted(self.NAMES[3:], key=str.encode), ["a/"])
        inside = self._pages(full, maxResults=size, delimiter="/", prefix="a/")
        assert _joined(inside) == (["a/", "a/1", "a/2"], ["a/b/"])

    def test_a_token_of_no_page_is_refused(self, client: _Client) -> None:
        assert client.ask("GET", client.path(), pageToken="hm").status == 400

    def test_what_it_can_not_list_it_refuses(self, own: _Client) -> None:
        assert own.ask("GET", own.path(), maxResults="0").status == 400
        assert own.ask("GET", own.path(), versions="true").status == 501

    def test_the_page_size_is_an_option(self, connect: _Connect) -> None:
        with _served("--page-size", "3") as address:
            client = connect(address)
            client.make()
            for name in self.NAMES:
                client.put(name, b"x")
            assert [len(items) for items, _ in self._pages(client, maxResults=1000)] == [3, 3, 2]


class TestBuckets:
    def test_a_bucket_is_made_once_and_deleted_empty(self, client: _Client) -> None:
        path = f"/storage/v1/b/{client.bucket}"
        assert client.make().status == 409
        assert client.ask("GET", path).json["location"] and client.ask("GET", path).json["storageClass"]
        client.put("x", b"x")
        assert client.ask("DELETE", path).status == 409
        client.of("DELETE", "x")
        assert client.of("GET", "x").status == client.read("x").status == 404
        client.ask("DELETE", path)
        assert client.ask("GET", path).status == client.ask("DELETE", path).status == 404

    def test_a_deletion_is_answered_with_no_content(self, client: _Client) -> None:
        client.put("x", b"x")
        assert client.of("DELETE", "x").status == 204
        assert client.ask("DELETE", f"/storage/v1/b/{client.bucket}").status == 204

    def test_a_requester_pays(self, client: _Client, connect: _Connect) -> None:
        paid = connect(client.address)
        paid.make(billing={"requesterPays": True})
        assert paid.put("x", b"x", userProject="p").status == 200
        refusal = paid.put("x", b"x")
        assert refusal.status == 400 and "requester pays" in refusal.json["error"]["message"]
        assert paid.of("GET", "x").status == paid.read("x").status == 400
        client.put("x", b"x")
        path = f"{client.path('x')}/rewriteTo{paid.path('z').removeprefix('/storage/v1')}"
        assert client.ask("POST", path, b"").status == 400
        assert client.ask("POST", path, b"", userProject="p").status == 200
        session = paid.start("y", userProject="p")
        assert paid.send(session, None, b"y").status == 200

    def test_tokens_are_let_in_while_they_are_in_the_file(self, tmp_path: Path, connect: _Connect) -> None:
        tokens = tmp_path / "tokens"
        tokens.write_text("one\ntwo\n")
        with _served("--tokens", str(tokens)) as address:
            client = connect(address)
            refusal = client.make()
            assert refusal.status == 401 and "WWW-Authenticate" in refusal.headers
            client.headers["Authorization"] = "Bearer two"
            assert client.make().status == client.put("x", b"x").status == 200
            assert [status for status, _ in _batch(client, ["x"])] == [204]
            tokens.write_text("one\n")
            assert client.put("x", b"x").status == 401


def _compose(client: _Client, sources: object, **query: Any) -> _Answer:
    told = {"sourceObjects": sources, "destination": {"contentType": "a/b"}}
    return client.post(f"{client.path('all/3')}/compose", told, **query)


class TestWholeObjects:
    SOURCES: Sequence[Mapping[str, str]] = ({"name": "1"}, {"name": "2"}, {"name": "1"})

    @pytest.fixture
    def full(self, client: _Client) -> _Client:
        client.put("1", b"one")
        client.put("2", b"two")
        return client

    def test_composed_of_others(self, full: _Client) -> None:
        made = _compose(full, self.SOURCES).json
        assert made["contentType"] == "a/b" and made["crc32c"] == _crc(b"onetwoone")
        assert full.read("all/3").body == b"onetwoone"
        assert full.read("all/3", "2-6").body == b"etwoo"
        assert _compose(full, [{"name": "1"}, {"name": "none"}]).status == 404

    def test_what_is_composed_counts_its_components_and_has_no_md5(self, full: _Client) -> None:
        made = _compose(full, self.SOURCES).json
        assert made["componentCount"] == 3 and "md5Hash" not in made and made["size"] == "9"

    def test_composing_wants_its_generations(self, full: _Client) -> None:
        first = {"name": "1", "generation": full.of("GET", "1").json["generation"]}
        assert _compose(full, [first, {"name": "2"}], ifGenerationMatch=0).status == 200
        assert _compose(full, [first, {"name": "2"}], ifGenerationMatch=0).status == 412
        other = {"name": "1", "objectPreconditions": {"ifGenerationMatch": "1"}}
        assert _compose(full, [other]).status == 412
        assert _compose(full, [{"name": "1", "generation": 1}]).status == 404

    @pytest.mark.parametrize("count", [0, 33])
    def test_only_so_many_are_composed(self, full: _Client, count: int) -> None:
        assert _compose(full, [{"name": "1"}] * 32).status == 200
        assert _compose(full, [{"name": "1"}] * count).status == 400

    def test_rewritten_elsewhere(self, client: _Client, connect: _Connect) -> None:
        client.put_both({"name": "a/1", "metadata": {"k": "v"}}, b"one")
        other = connect(client.address)
        other.make()
        path = f"{client.path('a/1')}/rewriteTo{other.path('b/2').removeprefix('/storage/v1')}"
        done = client.ask("POST", path, b"").json
        assert done["done"] is True and done["resource"]["metadata"] == {"k": "v"}
        assert other.read("b/2").body == b"one"

    def test_rewriting_wants_its_generations(self, full: _Client) -> None:
        path = f"{full.path('1')}/rewriteTo{full.path('2').removeprefix('/storage/v1')}"
        assert full.ask("POST", path, b"", ifGenerationMatch=0).status == 412
        assert full.ask("POST", path, b"", ifSourceGenerationMatch=1).status == 412


def _batch(client: _Client, names: Sequence[str], method: str = "DELETE") -> list[tuple[int, str]]:
    """Ask for all of them in one request; return each one's status and ID."""
    head = "--=b=\nContent-Type: application/http\nContent-Transfer-Encoding: binary\nContent-ID: <x+{}>\n\n"
    parts = [
        f"{head.format(at)}{method} {client.path(name)} HTTP/1.1\naccept: */*\ncontent-length: 0\n"
        for at, name in enumerate(names)
    ]
    body = "\n".join([*parts, "--=b=--"]).encode()
    answer = client.ask(
        "POST", "/batch/storage/v1", body, {"Content-Type": 'multipart/mixed; boundary="=b="'}
    )
    if answer.status != 200:
        return [(answer.status, "")]
    boundary = answer.headers["Content-Type"].partition("boundary=")[2]
    found = []
    for part in answer.body.decode().split(f"--{boundary}")[1:-1]:
        identity = part.partition("Content-ID: ")[2].partition("\r\n")[0]
        found.append((int(part.partition("HTTP/1.1 ")[2][:3]), identity))
    return found


class TestBatches:
    def test_each_call_is_made(self, client: _Client) -> None:
        client.put("a/1", b"x")
        client.put("a 2", b"x")
        assert [status for status, _ in _batch(client, ["a/1", "none", "a 2"])] == [204, 404, 204]
        assert client.of("GET", "a/1").status == client.of("GET", "a 2").status == 404

    def test_each_answer_names_its_call(self, client: _Client) -> None:
        answers = _batch(client, ["1", "2"])
        assert answers == [(404, "<response-x+0>"), (404, "<response-x+1>")]

    def test_a_batch_may_read(self, client: _Client) -> None:
        client.put("x", b"x")
        assert [status for status, _ in _batch(client, ["x", "none"], "GET")] == [200, 404]

    def test_a_batch_holds_a_hundred_calls(self, client: _Client) -> None:
        assert len(_batch(client, ["x"] * 100)) == 100
        assert _batch(client, ["x"] * 101) == [(400, "")]

    def test_a_call_that_it_can_not_batch_is_refused(self, own: _Client) -> None:
        assert _batch(own, ["x"], "POST") == [(400, "")]


class TestFaults:
    def test_a_status_is_answered_as_often_as_told(self, own: _Client) -> None:
        fault = {"method": "POST", "path": "name=a", "skip": 1, "times": 2, "do": "status 503"}
        own.tell("faults", [fault])
        answers = [own.put("a", b"x" * 100000) for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 503, 503, 200]
        assert "Retry-After" not in answers[1].headers
        own.tell(
            "faults", [{"method": "GET", "path": "", "times": 1, "do": "status 429", "retry_after": True}]
        )
        assert own.read("a").headers["Retry-After"] == "0"

    def test_a_reset_before_does_nothing_and_one_after_does_all(self, own: _Client) -> None:
        for do, status in (("reset before", 404), ("reset after", 200)):
            own.tell("faults", [{"method": "POST", "path": "upload", "times": 1, "do": do}])
            with pytest.raises(ConnectionError):
                own.put("a", b"x" * 10)
            assert own.of("GET", "a").status == status

    def test_what_came_of_a_chunk_is_kept(self, own: _Client) -> None:
        session = own.start("s")
        size = 2 * _QUANTUM
        own.tell("faults", [{"method": "PUT", "path": "upload_id", "times": 1, "do": f"keep {_QUANTUM + 9}"}])
        with pytest.raises(ConnectionError):
            own.send(session, f"0-{size - 1}/{size}", b"a" * size)
        assert _held(own.send(session, f"*/{size}")) == f"bytes=0-{_QUANTUM - 1}"
        assert own.send(session, f"{_QUANTUM}-{size - 1}/{size}", b"b" * _QUANTUM).status == 200

    def test_a_body_that_breaks_off_makes_no_object(self, own: _Client) -> None:
        own.tell("faults", [{"method": "POST", "path": "", "times": 1, "do": "keep 5"}])
        with pytest.raises(ConnectionError):
            own.put("a", b"x" * 10)
        assert own.of("GET", "a").status == 404

    def test_requests_are_told(self, own: _Client) -> None:
        own.tell("reset", {})
        session = own.start("a/b")
        own.send(session, None, b"x")
        own.of("GET", "a/b")
        upload = f"/upload/storage/v1/b/{own.bucket}/o"
        told = [["POST", upload, "resumable"], ["PUT", upload, "resumable"], ["GET", own.path("a/b"), ""]]
        assert own.tell("requests") == told

    def test_what_is_no_fault_is_refused(self, own: _Client) -> None:
        for told in ([{"method": "GET", "do": "dance"}], [{"do": "reset after"}], {"a": 1}, [3]):
            assert own.ask("POST", "/_gcs/faults", json.dumps(told).encode()).status == 400
