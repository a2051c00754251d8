"""The tests' own Google Cloud Storage keeps the real one's rules: else to pass against it proves nothing."""

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
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import crc32c
import pytest

import support.gcs_server
from support.servers import served_by

_QUANTUM = 262144
_TESTS = Path(support.gcs_server.__file__).parent.parent


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
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
            return _Answer(answer.status, dict(answer.headers.items()), answer.read())
        except OSError:
            self._connection.close()
            raise

    def tell(self, what: str, told: object = None) -> Any:
        body = None if told is None else json.dumps(told).encode()
        answer = self.ask("GET" if body is None else "POST", f"/_gcs/{what}", body)
        assert answer.status == 200, answer
        return answer.json

    def make(self, **resource: object) -> _Answer:
        told = json.dumps({"name": self.bucket, **resource}).encode()
        return self.ask("POST", "/storage/v1/b", told, project="p")

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
        told = json.dumps({"name": name, **(resource or {})}).encode()
        headers = {} if length is None else {"X-Upload-Content-Length": str(length)}
        return self.ask("POST", f"/upload{self.path()}", told, headers, uploadType="resumable", **query)

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
def address() -> Iterator[str]:
    with _served() as running:
        yield running


@pytest.fixture
def connect() -> Iterator[_Connect]:
    """Return a maker of clients, which are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connected(address: str, bucket: str = "") -> _Client:
            bucket = bucket or f"bucket-{uuid.uuid4().hex[:12]}"
            return stack.enter_context(contextlib.closing(_Client(address, bucket)))

        yield connected


@pytest.fixture
def client(address: str, connect: _Connect) -> Iterator[_Client]:
    asking = connect(address)
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
        assert read.headers["x-goog-generation"] == put["generation"]
        assert read.headers["x-goog-hash"] == f"crc32c={put['crc32c']},md5={put['md5Hash']}"
        assert client.ask("GET", client.path(name), alt="media").body == b"hello"

    def test_a_slash_in_a_name_is_escaped_or_the_path_is_another(self, client: _Client) -> None:
        client.put("a/b", b"x")
        assert client.ask("GET", f"/storage/v1/b/{client.bucket}/o/a/b").status == 404

    @pytest.mark.parametrize("name", ["", ".", "..", "a\nb", "é" * 513])
    def test_a_name_that_no_object_can_have_is_refused(self, client: _Client, name: str) -> None:
        assert client.put(name, b"x").status == 400
        assert client.try_start(name).status == 400

    def test_the_bytes_of_a_range(self, client: _Client) -> None:
        client.put("r", b"0123456789")
        for span, body, shown in (("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("-3", b"789", "7-9")):
            read = client.read("r", span)
            assert (read.status, read.body) == (206, body)
            assert read.headers["Content-Range"] == f"bytes {shown}/10"
        assert client.read("r", "8-99").body == b"89"
        assert client.read("r", "10-12").status == 416

    def test_what_is_missing_is_answered_as_google_says_it(self, client: _Client) -> None:
        error = client.of("GET", "none").json["error"]
        assert error["code"] == 404 and error["errors"][0]["reason"] == "notFound"
        assert error["errors"][0]["domain"] == "global" and error["message"]
        assert client.read("none").status == 404
        assert client.of("DELETE", "none").status == 404
        client.bucket = "bucket-none"
        assert client.put("x", b"x").status == client.try_start("x").status == 404

    def test_both_parts_of_a_multipart_body_arrive(self, client: _Client) -> None:
        for line, data in ((b"\r\n", b"\n--=x\r\n\r\n"), (b"\n", b"\r\n\r"), (b"\r\n", b"")):
            put = client.put_both({"name": "m", "metadata": {"k": "v"}}, data, line)
            assert put.status == 200 and put.json["metadata"] == {"k": "v"}
            assert put.json["contentType"] == "text/plain"
            assert client.read("m").body == data

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
        assert _held(client.send(session, "*/*")) is None
        assert (
            _held(client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)) == f"bytes=0-{_QUANTUM - 1}"
        )
        assert _held(client.send(session, "*/*")) == f"bytes=0-{_QUANTUM - 1}"
        assert _held(client.send(session, f"*/{_QUANTUM + 3}")) == f"bytes=0-{_QUANTUM - 1}"
        assert client.of("GET", "s").status == 404
        ended = client.send(session, f"{_QUANTUM}-{_QUANTUM + 2}/{_QUANTUM + 3}", b"end")
        assert ended.status == 200 and ended.json["metadata"] == {"k": "v"}
        assert client.read("s").body == b"a" * _QUANTUM + b"end"
        client.of("DELETE", "s")
        for span in (f"*/{_QUANTUM + 3}", "*/*"):
            again = client.send(session, span)
            assert (again.status, again.json) == (200, ended.json)
        assert client.send(session, "*/4").status == 400

    def test_a_known_size_ends_what_is_held(self, client: _Client) -> None:
        session = client.start("s")
        client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        assert client.send(session, f"*/{_QUANTUM}").status == 200
        assert client.send(client.start("empty"), "*/0").json["size"] == "0"

    def test_a_body_without_a_range_is_the_whole(self, client: _Client) -> None:
        session = client.start("s")
        assert client.send(session, None, b"whole").status == 200
        assert client.read("s").body == b"whole"

    @pytest.mark.parametrize(
        ("span", "size"),
        [
            ("0-99/*", 100),
            ("0-99/200", 100),
            (f"{_QUANTUM}-{2 * _QUANTUM - 1}/*", _QUANTUM),
            ("0-99/100", 99),
            ("0-99/50", 100),
            ("5-3/*", 0),
            ("bits", 0),
        ],
    )
    def test_a_chunk_that_does_not_fit_is_refused(self, client: _Client, span: str, size: int) -> None:
        session = client.start("s")
        assert client.send(session, span, b"x" * size).status == 400
        assert _held(client.send(session, "*/*")) is None

    def test_an_announced_size_is_kept_to(self, client: _Client) -> None:
        session = client.start("s", length=3)
        assert client.send(session, "0-3/4", b"abcd").status == 400
        assert client.send(session, "0-2/3", b"abc").status == 200

    def test_bytes_that_are_held_are_skipped(self, client: _Client) -> None:
        session = client.start("s")
        client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        client.send(session, f"0-{_QUANTUM - 1}/*", b"b" * _QUANTUM)
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
            with pytest.raises(ConnectionResetError):
                broken.recv(1)
        assert _held(client.send(session, "*/*")) == f"bytes=0-{2 * _QUANTUM - 1}"
        assert client.of("GET", "s").status == 404

    def test_a_cancelled_session_is_gone(self, client: _Client) -> None:
        session = client.start("s")
        assert client.ask("DELETE", session).status == 499
        assert client.send(session, "*/*").status == client.send(session, None, b"x").status == 410
        assert client.ask("DELETE", session).status == 410
        assert client.send(session + "x", "*/*").status == 404

    def test_open_sessions_are_told(self, client: _Client) -> None:
        def mine() -> Sequence[object]:
            return [each for each in client.tell("sessions")["open"] if each["bucket"] == client.bucket]

        session = client.start("s")
        client.send(session, f"0-{_QUANTUM - 1}/*", b"a" * _QUANTUM)
        assert mine() == [{"bucket": client.bucket, "name": "s", "held": _QUANTUM}]
        client.send(session, f"*/{_QUANTUM}")
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
        assert self._pages(full, startOffset="b", endOffset="\uffff") == [(["b", "é"], [])]
        assert full.ask("GET", full.path(), prefix="none").json == {"kind": "storage#objects"}

    def test_a_delimiter_folds(self, full: _Client) -> None:
        assert self._pages(full, delimiter="/", endOffset="é") == [(["a0", "b"], ["a/"])]
        assert self._pages(full, delimiter="/", prefix="a/") == [(["a/1", "a/2"], ["a/b/"])]

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_pages_add_up(self, full: _Client, size: int) -> None:
        full.put("a/", b"x")
        pages = self._pages(full, maxResults=size, delimiter="/")
        assert all(len(items) + len(prefixes) == size for items, prefixes in pages[:-1])
        assert _joined(pages) == (sorted(self.NAMES[3:], key=str.encode), ["a/"])
        inside = self._pages(full, maxResults=size, delimiter="/", prefix="a/")
        assert _joined(inside) == (["a/", "a/1", "a/2"], ["a/b/"])

    def test_what_it_can_not_list_it_refuses(self, full: _Client) -> None:
        assert full.ask("GET", full.path(), maxResults="0").status == 400
        assert full.ask("GET", full.path(), pageToken="hm").status == 400
        assert full.ask("GET", full.path(), versions="true").status == 501

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
        assert client.ask("DELETE", path).status == 204
        assert client.ask("GET", path).status == 404

    def test_a_requester_pays(self, address: str, connect: _Connect) -> None:
        client = connect(address)
        client.make(billing={"requesterPays": True})
        assert client.put("x", b"x", userProject="p").status == 200
        refusal = client.put("x", b"x")
        assert refusal.status == 400 and "requester pays" in refusal.json["error"]["message"]
        assert client.of("GET", "x").status == client.read("x").status == 400
        free = connect(address)
        free.make()
        free.put("x", b"x")
        path = f"{free.path('x')}/rewriteTo{client.path('z').removeprefix('/storage/v1')}"
        assert free.ask("POST", path, b"").status == 400
        assert free.ask("POST", path, b"", userProject="p").status == 200
        session = client.start("y", userProject="p")
        assert client.send(session, None, b"y").status == 200

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


class TestWholeObjects:
    def test_composed_of_others(self, client: _Client) -> None:
        first = client.put("1", b"one").json["generation"]
        client.put("2", b"two")
        sources: list[dict[str, object]] = [{"name": "1", "generation": first}, {"name": "2"}, {"name": "1"}]

        def compose(sources: object, **query: Any) -> _Answer:
            told = json.dumps({"sourceObjects": sources, "destination": {"contentType": "a/b"}}).encode()
            return client.ask("POST", f"{client.path('all/3')}/compose", told, **query)

        made = compose(sources, ifGenerationMatch=0).json
        assert made["componentCount"] == 3 and "md5Hash" not in made and made["contentType"] == "a/b"
        assert made["crc32c"] == _crc(b"onetwoone")
        assert client.read("all/3").body == b"onetwoone"
        assert client.read("all/3", "2-6").body == b"etwoo"
        assert compose(sources, ifGenerationMatch=0).status == 412
        assert compose([{"name": "1", "objectPreconditions": {"ifGenerationMatch": "1"}}]).status == 412
        assert compose([{"name": "1", "generation": 1}]).status == 404
        assert compose([{"name": "1"}] * 33).status == compose([]).status == 400

    def test_rewritten_elsewhere(self, client: _Client, connect: _Connect) -> None:
        client.put_both({"name": "a/1", "metadata": {"k": "v"}}, b"one")
        other = connect(client.address)
        other.make()
        path = f"{client.path('a/1')}/rewriteTo{other.path('b/2').removeprefix('/storage/v1')}"
        done = client.ask("POST", path, b"").json
        assert done["done"] is True and done["resource"]["metadata"] == {"k": "v"}
        assert other.read("b/2").body == b"one"
        assert client.ask("POST", path, b"", ifGenerationMatch=0).status == 412
        assert client.ask("POST", path, b"", ifSourceGenerationMatch=1).status == 412


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
    def test_each_call_has_its_answer(self, client: _Client) -> None:
        client.put("a/1", b"x")
        client.put("a 2", b"x")
        answers = _batch(client, ["a/1", "none", "a 2"])
        assert answers == [(204, "<response-x+0>"), (404, "<response-x+1>"), (204, "<response-x+2>")]
        assert client.ask("GET", client.path()).json == {"kind": "storage#objects"}

    def test_what_is_no_batch_is_refused(self, client: _Client) -> None:
        assert _batch(client, ["x"] * 101) == [(400, "")]
        assert _batch(client, ["x"], "POST") == [(400, "")]
        assert len(_batch(client, ["x"] * 100, "GET")) == 100


class TestFaults:
    def test_a_status_is_answered_as_often_as_told(self, client: _Client) -> None:
        fault = {"method": "POST", "path": "name=a", "skip": 1, "times": 2, "do": "status 503"}
        client.tell("faults", [fault])
        answers = [client.put("a", b"x" * 100000) for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 503, 503, 200]
        assert "Retry-After" not in answers[1].headers
        client.tell(
            "faults", [{"method": "GET", "path": "", "times": 1, "do": "status 429", "retry_after": True}]
        )
        assert client.read("a").headers["Retry-After"] == "0"

    def test_a_reset_before_does_nothing_and_one_after_does_all(self, client: _Client) -> None:
        for do, status in (("reset before", 404), ("reset after", 200)):
            client.tell("faults", [{"method": "POST", "path": "upload", "times": 1, "do": do}])
            with pytest.raises(ConnectionError):
                client.put("a", b"x" * 10)
            assert client.of("GET", "a").status == status

    def test_what_came_of_a_chunk_is_kept(self, client: _Client) -> None:
        session = client.start("s")
        size = 2 * _QUANTUM
        client.tell(
            "faults", [{"method": "PUT", "path": "upload_id", "times": 1, "do": f"keep {_QUANTUM + 9}"}]
        )
        with pytest.raises(ConnectionError):
            client.send(session, f"0-{size - 1}/{size}", b"a" * size)
        assert _held(client.send(session, f"*/{size}")) == f"bytes=0-{_QUANTUM - 1}"
        assert client.send(session, f"{_QUANTUM}-{size - 1}/{size}", b"b" * _QUANTUM).status == 200

    def test_a_body_that_breaks_off_makes_no_object(self, client: _Client) -> None:
        client.tell("faults", [{"method": "POST", "path": "", "times": 1, "do": "keep 5"}])
        with pytest.raises(ConnectionError):
            client.put("a", b"x" * 10)
        assert client.of("GET", "a").status == 404

    def test_requests_are_told(self, client: _Client) -> None:
        client.tell("reset", {})
        session = client.start("a/b")
        client.send(session, None, b"x")
        client.of("GET", "a/b")
        upload = f"/upload/storage/v1/b/{client.bucket}/o"
        told = [["POST", upload, "resumable"], ["PUT", upload, "resumable"], ["GET", client.path("a/b"), ""]]
        assert client.tell("requests") == told

    def test_what_is_no_fault_is_refused(self, client: _Client) -> None:
        for told in ([{"method": "GET", "do": "dance"}], [{"do": "reset after"}], {"a": 1}, [3]):
            assert client.ask("POST", "/_gcs/faults", json.dumps(told).encode()).status == 400
