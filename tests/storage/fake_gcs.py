"""Google's object store, as much of its JSON API as gcsfs and TensorStore use, on a port of this machine.

cloud.google.com/storage/docs/json_api: objects are listed, read (also in part), stored whole, in pieces or only if
absent, and deleted, one by one or in a batch. There is nothing to rename or append with.
"""

import base64
import email
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class FakeGCS:
    """The objects, by bucket and name, each with its generation. `with` it is served at `url`."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.calls: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.generation = 0
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self) -> dict[str, str]:
        """What makes gcsfs and TensorStore come here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def __enter__(self) -> "FakeGCS":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def names(self, start: str = "") -> list[str]:
        with self.lock:
            return sorted(name for _, name in self.objects if name.startswith(start))

    def put(self, bucket: str, name: str, data: bytes, match: str | None = None) -> dict[str, Any] | None:
        """The object's description; None where its generation is not `match` (0: absent)."""
        with self.lock:
            there = self.objects.get((bucket, name), (b"", 0))[1]
            if match is not None and int(match) != there:
                return None
            self.generation += 1
            self.objects[bucket, name] = (data, self.generation)
        return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(), "etag": str(generation),
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or that lost patience, is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    store: FakeGCS
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def fail(self, status: int) -> None:
        self.answer_json({"error": {"code": status, "message": str(status)}}, status)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def route(self) -> tuple[str, str, str, dict[str, str]]:
        """(kind of path, bucket, object, query)"""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        match = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", parts.path)
        if match is None:
            return parts.path, "", "", query
        self.store.calls[f"{self.command} {match[1] or ''}"] += 1
        return match[1] or "", unquote(match[2]), unquote(match[3] or ""), query

    def do_GET(self) -> None:
        kind, bucket, name, query = self.route()
        self.body()
        if not bucket:
            return self.fail(404)
        if not name:
            return self.answer_json(self.listing(bucket, query) if "/o" in self.path else {"name": bucket})
        with self.store.lock:
            found = self.store.objects.get((bucket, name))
        if found is None:
            return self.fail(404)
        data, generation = found
        if kind != "download" and query.get("alt") != "media":
            return self.answer_json(self.store.describe(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.fail(412)
        headers = {"x_goog_generation": str(generation), "ETag": str(generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(200, data, **headers)
        first = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
        last = min(len(data) - 1, int(wanted[2])) if wanted[1] and wanted[2] else len(data) - 1
        if first >= len(data):
            return self.fail(416)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], **headers)

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        low, high = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        with self.store.lock:
            for where, name in sorted(self.store.objects):
                if where != bucket or not name.startswith(prefix) or name < low or (high and name >= high):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    items.append(self.store.describe(bucket, name))
        most = int(query.get("maxResults", 1000))
        return {"kind": "storage#objects", "items": items[:most], "prefixes": sorted(prefixes)}

    def do_POST(self) -> None:
        kind, bucket, _, query = self.route()
        body = self.body()
        if kind.startswith("/batch"):
            return self.batch(body)
        if kind != "upload":
            return self.answer_json({"name": bucket}) if kind == "" else self.fail(404)
        if "upload_id" in query:
            return self.piece(query["upload_id"], body)
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            with self.store.lock:
                self.store.uploads[f"up{len(self.store.uploads)}"] = (bucket, name, bytearray())
                number = f"up{len(self.store.uploads) - 1}"
            return self.answer(200, Location=f"{self.store.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}")
        name, data = query.get("name", ""), body
        if query["uploadType"] == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert mark
            _, about, content = re.split(b"(?:\r?\n)?--" + re.escape(mark[1].encode()), body, maxsplit=2)
            name = json.loads(re.split(b"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            content = content[: content.rindex(b"--" + mark[1].encode())]
            data = re.split(b"\r?\n\r?\n", content, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
        described = self.store.put(bucket, name, data, query.get("ifGenerationMatch"))
        self.answer_json(described) if described else self.fail(412)

    def piece(self, upload: str, body: bytes) -> None:
        """A piece of an object; it is there once the last one is."""
        bucket, name, data = self.store.uploads[upload]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        self.answer_json(self.store.put(bucket, name, bytes(data)))

    def do_PUT(self) -> None:
        self.piece(self.route()[3]["upload_id"], self.body())

    def remove(self, bucket: str, name: str, match: str | None = None) -> int:
        with self.store.lock:
            found = self.store.objects.get((bucket, name))
            if found is None:
                return 404
            if match is not None and match != str(found[1]):
                return 412
            del self.store.objects[bucket, name]
            return 204

    def do_DELETE(self) -> None:
        _, bucket, name, query = self.route()
        self.body()
        status = self.remove(bucket, name, query.get("ifGenerationMatch"))
        self.answer(204) if status == 204 else self.fail(status)

    def batch(self, body: bytes) -> None:
        """Deletions in one multipart message: gcsfs removes folders so."""
        self.store.calls["batch"] += 1
        message = email.message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + body)
        answers = []
        for number, part in enumerate(message.get_payload(), 1):  # pyright: ignore[reportArgumentType]
            path = part.get_payload().strip().split()[1]  # pyright: ignore[reportAttributeAccessIssue]
            match = re.search(r"/b/([^/]+)/o/([^?\s]+)", path)
            assert match
            status = self.remove(unquote(match[1]), unquote(match[2]))
            answers.append(
                f"--answers\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self.answer(200, ("".join(answers) + "--answers--").encode(), Content_Type="multipart/mixed; boundary=answers")
