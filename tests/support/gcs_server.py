"""A small and strict Google Cloud Storage in memory: its JSON API, and multipart uploads by its XML API.

Run as `python -m support.gcs_server --port N`; with port 0 it takes a free one and prints its URL. What it
can't do it refuses. `/_gcs/` is the door for tests: the requests so far, open sessions, faults to come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from support.gcs_faults import Fault
from support.gcs_objects import Conditions, Content, Json, Refusal, Stored, invalid, written_fields
from support.gcs_permissions import Permissions
from support.gcs_quirks import Quirks
from support.gcs_state import Cloud, Session
from support.gcs_uploads import MultipartUploads
from support.gcs_wire import (
    Answer,
    Request,
    announced,
    batched,
    calls,
    chunk,
    in_json,
    media,
    received,
    refused,
    related,
    sums,
)
from support.gcs_xml import XmlApi, is_xml, refused_in_xml

_ADMIN = "/_gcs/"
_KEY = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")
_MOST_LISTED = 1000
_JOINED = 1 << 16
_REWRITTEN = 8 << 20
"""Bytes that one call of a rewrite copies."""
_UNSERVED = ("matchGlob", "versions", "softDeleted", "filter", "includeTrailingDelimiter")
"""Parameters that change what an answer means: they are refused, and others without an effect are not."""


class PeerAddress:
    """What tests ask beside the API: which requests came, and which faults are to meet them.

    Faults that are told take the place of those before.
    """

    def __init__(
        self, cloud: Cloud, uploads: MultipartUploads, permissions: Permissions, quirks: Quirks
    ) -> None:
        self._cloud = cloud
        self._uploads = uploads
        self._permissions = permissions
        self._quirks = quirks
        self._lock = threading.Lock()
        self._log: list[Sequence[str]] = []
        self._faults: Sequence[Fault] = ()

    def arrival(self, method: str, target: str) -> Fault | None:
        """Note a request; return the fault that it meets."""
        path, _, query = target.partition("?")
        with self._lock:
            self._log.append([method, path, parse_qs(query).get("uploadType", [""])[0]])
            for fault in self._faults:
                wanted = fault.method.fullmatch(method) and fault.path.search(target)
                if not wanted or not fault.times:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def answer(self, request: Request) -> Answer:
        match request.method, request.target.removeprefix(_ADMIN):
            case "GET", "sessions":
                sessions, uploads = self._cloud.open_sessions(), self._uploads.pending()
                found = [(each.bucket, each.name, each.held) for each in sessions]
                found += [(each.bucket, each.name, each.held) for each in uploads]
                fields = ("bucket", "name", "held")
                return in_json({"open": [dict(zip(fields, each, strict=True)) for each in found]})
            case "GET", "requests":
                with self._lock:
                    return in_json(self._log)
            case "GET", "faults":
                with self._lock:
                    return in_json({"to_come": sum(fault.times for fault in self._faults)})
            case "POST", "reset":
                with self._lock:
                    self._log = []
                return in_json({})
            case "POST", "quirks":
                self._quirks.set(request.json())
                return in_json({})
            case "POST", "json-only":
                self._quirks.json_only.add(str(request.json()["bucket"]))
                return in_json({})
            case "POST", "denials":
                self._permissions.deny(request.json())
                return in_json({})
            case "POST", "faults":
                try:
                    faults = [Fault.parse(told) for told in json.loads(bytes(request.body))]
                except (ValueError, TypeError, LookupError, re.error) as error:
                    return refused(invalid(f"Not faults: {error!r}"))
                except Refusal as refusal:
                    return refused(refusal)
                with self._lock:
                    self._faults = faults
                return in_json({})
            case _:
                return refused(_not_found())


class Api:
    """The requests of the JSON API, and what they do; those of the XML API are handed on."""

    def __init__(
        self,
        cloud: Cloud,
        uploads: MultipartUploads | None,
        permissions: Permissions,
        quirks: Quirks,
        tokens: Path | None,
    ) -> None:
        self._cloud = cloud
        self._xml = XmlApi(cloud, uploads, permissions) if uploads else None
        self._permissions = permissions
        self._quirks = quirks
        self._tokens = tokens

    def answer(self, request: Request) -> Answer:
        if self.serves_xml(request):
            return self._answer_in_xml(request)
        try:
            self._authorize(request)
            for name in _UNSERVED:
                if request.query.get(name, "false") != "false":
                    raise Refusal(501, "notImplemented", f"{name} is not served here")
            self._permissions.check(request)
            self._quirks.check(request)
            return self._quirks.changed(self._route(request))
        except Refusal as refusal:
            return refused(refusal, {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None)

    def serves_xml(self, request: Request) -> bool:
        """Return True for a request of the XML API, where that is on for the bucket."""
        return self._xml is not None and is_xml(request) and request.segments[0] not in self._quirks.json_only

    def _answer_in_xml(self, request: Request) -> Answer:
        assert self._xml is not None
        try:
            self._authorize(request)
            self._quirks.check(request)
            return self._quirks.changed(self._xml.answer(request))
        except Refusal as refusal:
            return refused_in_xml(refusal, {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None)

    def _authorize(self, request: Request) -> None:
        if self._tokens is None:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        # Read at every request: tokens end while the server runs.
        if scheme != "Bearer" or not token or token not in self._tokens.read_text().splitlines():
            raise Refusal(401, "authError", "Invalid Credentials")

    def _route(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        match method, *request.segments:
            case "POST", "batch", "storage", "v1":
                return batched([(identity, self.answer(call)) for identity, call in calls(request)])
            case "POST", "storage", "v1", "b":
                return in_json(self._cloud.create_bucket(request.json()).resource)
            case _, "storage", "v1", "b", bucket, *rest:
                self._charge(request, bucket)
                return (
                    self._bucket(request, method, bucket)
                    if not rest
                    else self._object(request, method, bucket, rest)
                )
            case "GET", "download", "storage", "v1", "b", bucket, "o", name:
                self._charge(request, bucket)
                return self._read(request, bucket, name)
            case "PUT" | "POST" | "DELETE", "upload", "storage", "v1", "b", _, "o" if (
                "upload_id" in request.query
            ):
                return self._session(request, request.query["upload_id"])
            case "POST", "upload", "storage", "v1", "b", bucket, "o":
                self._charge(request, bucket)
                return self._upload(request, bucket)
            case _:
                raise _not_found()

    def _charge(self, request: Request, bucket: str) -> None:
        if self._cloud.bucket(bucket).requester_pays and not request.query.get("userProject"):
            message = "UserProjectMissing: Bucket is requester pays bucket but no user project provided."
            raise Refusal(400, "required", message)

    def _bucket(self, request: Request, method: str, bucket: str) -> Answer:
        if method == "GET":
            return in_json(self._cloud.bucket(bucket).resource)
        if method == "DELETE":
            self._cloud.delete_bucket(bucket)
            return Answer(204)
        raise _not_found()

    def _object(self, request: Request, method: str, bucket: str, rest: Sequence[str]) -> Answer:
        match method, *rest:
            case "GET", "o":
                return self._list(request, bucket)
            case "GET", "o", name:
                return self._read(request, bucket, name)
            case "DELETE", "o", name:
                self._cloud.delete(bucket, name, Conditions.parse(request.query))
                return Answer(204)
            case "POST", "o", name, "moveTo", "o", new_name:
                source = self._cloud.get(bucket, name, Conditions.parse(request.query, "Source"))
                moved = self._rewrite(request, source, bucket, new_name)
                self._cloud.delete(bucket, name, Conditions())
                return moved
            case "POST", "o", name, "compose":
                return self._compose(request, bucket, name)
            case "POST", "o", name, "rewriteTo", "b", into, "o", new_name:
                self._charge(request, into)
                source = self._cloud.get(bucket, name, Conditions.parse(request.query, "Source"))
                return self._rewrite(request, source, into, new_name)
            case _:
                raise _not_found()

    def _read(self, request: Request, bucket: str, name: str) -> Answer:
        try:
            stored = self._cloud.get(bucket, name, Conditions.parse(request.query))
        except Refusal as refusal:
            if refusal.status == 404:
                self._permissions.reveal_missing(bucket)
            raise
        if request.query.get("alt", "json") == "media":
            return media(stored, request.headers.get("Range"))
        if request.segments[0] == "download":
            raise invalid("A download without alt=media")
        return in_json(stored.resource)

    def _list(self, request: Request, bucket: str) -> Answer:
        page = self._cloud.list(bucket, request.query)
        # Google leaves out what is empty.
        shown = {
            "items": [stored.resource for stored in page.items],
            "prefixes": page.prefixes,
            "nextPageToken": page.token,
        }
        return in_json({"kind": "storage#objects", **{key: value for key, value in shown.items() if value}})

    def _upload(self, request: Request, bucket: str) -> Answer:
        query = request.query
        resource: Json = {}
        body, kind = request.body, request.headers.get("Content-Type", "")
        conditions = Conditions.parse(query)
        way = query.get("uploadType")
        if way == "multipart":
            resource, body, kind = related(request)
        elif way == "resumable":
            resource, kind = request.json(), request.headers.get("X-Upload-Content-Type", "")
        elif way != "media":
            raise invalid(f"Invalid uploadType: {way!r}")
        name = query.get("name", resource.get("name"))
        if not isinstance(name, str) or resource.get("bucket", bucket) != bucket:
            raise Refusal(400, "required", "The object's name or bucket is missing, or is not the query's")
        given = sums(request.headers, resource)
        fields = written_fields({"contentType": kind, **resource} if kind else resource)
        if key := query.get("kmsKeyName"):
            if not _KEY.fullmatch(key):
                raise invalid(f"Not the name of a key: {key}")
            fields = {**fields, "kmsKeyName": f"{key}/cryptoKeyVersions/1"}
        if way != "resumable":
            if name in self._cloud.bucket(bucket).objects:
                self._permissions.require(bucket, "storage.objects.delete")
            content = Content([body] if len(body) else [])
            stored = self._cloud.put(bucket, name, content, fields, sums=given, conditions=conditions)
            return in_json(stored.resource)
        total = announced(request.headers)
        identity = self._cloud.start(Session(bucket, name, fields, given, conditions, total))
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={identity}"
        scheme = request.headers.get("X-Forwarded-Proto", "http")  # of a proxy that ends TLS
        url = f"{scheme}://{request.headers['Host']}{path}"
        return Answer(200, {"Location": url, "X-GUploader-UploadID": identity})

    def _session(self, request: Request, identity: str) -> Answer:
        if request.method == "DELETE":
            self._cloud.cancel(identity)
            return Answer(499)
        found = self._cloud.upload(identity, chunk(request), request.body, sums(request.headers, {}))
        if isinstance(found, Stored):
            return in_json(found.resource)
        return Answer(308, {"Range": f"bytes=0-{found - 1}"} if found else {})

    def _compose(self, request: Request, bucket: str, name: str) -> Answer:
        told = request.json()
        sources, into = told.get("sourceObjects"), told.get("destination", {})
        if not isinstance(sources, list) or not isinstance(into, dict):
            raise Refusal(400, "required", "sourceObjects is missing")
        found = []
        for source in sources:
            if not isinstance(source, dict) or not isinstance(source.get("name"), str):
                raise invalid(f"Not a source: {source}")
            wanted = source.get("objectPreconditions", {})
            if not isinstance(wanted, dict):
                raise invalid(f"Not preconditions: {wanted}")
            wanted |= {key: source[key] for key in ["generation"] if key in source}
            found.append((source["name"], Conditions.parse({key: str(wanted[key]) for key in wanted})))
        conditions = Conditions.parse(request.query)
        return in_json(self._cloud.compose(bucket, name, found, written_fields(into), conditions).resource)

    def _rewrite(self, request: Request, source: Stored, bucket: str, name: str) -> Answer:
        told = request.json()
        size, key = source.content.size, request.query.get("destinationKmsKeyName")
        done = _rewritten(request.query.get("rewriteToken"), source.generation) + _REWRITTEN
        if "/rewriteTo/" in request.target and done < size:
            so_far = {"kind": "storage#rewriteResponse", "totalBytesRewritten": str(done), "done": False}
            return in_json({**so_far, "objectSize": str(size), "rewriteToken": f"{source.generation}-{done}"})
        fields = written_fields(told) if told else source.fields
        stored = self._cloud.put(
            bucket,
            name,
            source.content,
            {**fields, "kmsKeyName": f"{key}/cryptoKeyVersions/1"} if key else fields,
            conditions=Conditions.parse(request.query),
            components=source.components,
        )
        told_sizes = {"totalBytesRewritten": str(size), "objectSize": str(size)}
        answer = {"kind": "storage#rewriteResponse", **told_sizes, "done": True}
        return in_json({**answer, "resource": stored.resource})


def _rewritten(token: str | None, generation: int) -> int:
    """How many bytes were copied by the calls before, which Google makes several of between locations."""
    if token is None:
        return 0
    of, _, done = token.partition("-")
    if of != str(generation) or not done.isdecimal():
        raise invalid(f"Not a token of this rewrite: {token}")
    return int(done)


class Server(ThreadingHTTPServer):
    """Connections, each served by a thread of its own."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], cloud: Cloud, tokens: Path | None, *, xml: bool) -> None:
        super().__init__(address, _Handler)
        permissions, quirks, uploads = Permissions(), Quirks(), MultipartUploads(cloud)
        self.api = Api(cloud, uploads if xml else None, permissions, quirks, tokens)
        self.door = PeerAddress(cloud, uploads, permissions, quirks)

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        # A client may leave as it likes; anything else is a fault of this server.
        if not isinstance(error, ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride] - no other server has this handler
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        admin = self.path.startswith(_ADMIN)
        fault = None if admin else self.server.door.arrival(self.command, self.path)
        do, _, number = fault.do.partition(" ") if fault else ("", "", "")
        if number == "before":
            self._reset()
            return
        size = self.headers.get("Content-Length", "0" if self.command in ("GET", "HEAD", "DELETE") else "")
        if not size.isdecimal() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._send(refused(Refusal(411, "lengthRequired", "Content-Length is required")))
            return
        length = int(size)
        kind = self.headers.get_content_type()
        body = received(self.rfile, min(length, int(number)) if do == "keep" else length, kind)
        request = Request(self.command, self.path, self.headers, body, length)
        broken = len(body) < length
        if fault and do == "status":
            answer = _failed(int(number), fault, in_xml=self.server.api.serves_xml(request))
        elif broken and "upload_id=" not in self.path:
            answer = None
        else:
            answer = self.server.door.answer(request) if admin else self.server.api.answer(request)
        if answer is None or broken or do in ("reset", "keep"):
            self._reset()
        else:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the base class names them

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Log nothing."""

    def _send(self, answer: Answer) -> None:
        pieces = () if self.command == "HEAD" else answer.body
        if sum(map(len, pieces)) <= _JOINED:
            self.connection.sendall(b"".join([answer.head, *pieces]))
            return
        self.connection.sendall(answer.head)
        for piece in pieces:
            self.connection.sendall(piece)

    def _reset(self) -> None:
        """End the connection with RST: the client can't take it for an answer's end."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Closed behind the backs of the base classes, which would say a polite goodbye first.
        os.close(self.connection.detach())


def _not_found() -> Refusal:
    return Refusal(404, "notFound", "Not Found")


def _failed(status: int, fault: Fault, *, in_xml: bool) -> Answer:
    reason = "rateLimitExceeded" if status == 429 else "backendError"
    answer = refused_in_xml if in_xml else refused
    return answer(Refusal(status, reason, "A fault"), {"Retry-After": "0"} if fault.retry_after else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Listen and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--page-size", type=int, default=_MOST_LISTED, help="the most in a listing's page")
    parser.add_argument("--tokens", type=Path, help="a file of the tokens that are let in, one a line")
    parser.add_argument("--no-md5", action="store_true", help="give objects an MD5 only when the client does")
    parser.add_argument("--no-xml", action="store_true", help="have no multipart uploads of the XML API")
    options = parser.parse_args(arguments)
    cloud = Cloud(min(options.page_size, _MOST_LISTED), md5=not options.no_md5)
    with Server((options.host, options.port), cloud, options.tokens, xml=not options.no_xml) as server:
        print(f"http://{options.host}:{server.server_address[1]}", flush=True)  # noqa: T201 - told to its starter
        server.serve_forever()


if __name__ == "__main__":
    main()
