#!/usr/bin/env bash
# pyarrow 26.0.1: its S3 client asks again where the store answers 503 SlowDown, but only for parts
# that are at least as long as the answer's own XML document. A shorter read has no room for the
# document; the client then reports INTERNAL_FAILURE "Failed to flush response stream" after one
# request and does not try again. So large files survive a busy store, and markers, receipts, footers'
# lengths and whole small files do not, whatever the retry strategy.
#
# Seen, with two answers of 503 (174 bytes each) before a good one:
#   16 bytes: OSError after 1 request; 173 bytes: OSError after 1; 174 bytes: read after 3;
#   4096 bytes: read after 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
export AWS_EC2_METADATA_DISABLED=true
"$folder/venv/bin/python" - <<'PY'
import http.server
import sys
import threading

import pyarrow as pa
import pyarrow.fs as pafs

OBJECT = b"x" * 100_000
BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce '
    b"your request rate.</Message><Resource>/b/k</Resource><RequestId>1</RequestId></Error>"
)
asked = {"busy": 0, "requests": 0}


class Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def give(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.give(200, b"", Content_Length=str(len(OBJECT)))

    def do_GET(self):
        asked["requests"] += 1
        if asked["busy"]:
            asked["busy"] -= 1
            kind = {"Content_Type": "application/xml", "Content_Length": str(len(BUSY))}
            return self.give(503, BUSY, **kind)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = OBJECT[first : last + 1]
        place = f"bytes {first}-{last}/{len(OBJECT)}"
        return self.give(206, part, Content_Length=str(len(part)), Content_Range=place)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
store = pafs.S3FileSystem(
    access_key="a", secret_key="b", region="us-east-1", scheme="http",
    endpoint_override=f"127.0.0.1:{server.server_port}",
    retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=10),
)  # fmt: skip
seen = {}
with store.open_input_file("b/k") as stream:
    for length in (16, len(BUSY) - 1, len(BUSY), 4096):
        asked.update(busy=2, requests=0)
        try:
            outcome = "read" if stream.read_at(length, 0) == OBJECT[:length] else "other bytes"
        except OSError as error:
            outcome = type(error).__name__
        seen[length] = (outcome, asked["requests"])
server.shutdown()
print(pa.__version__, seen)
wanted = {16: ("OSError", 1), 173: ("OSError", 1), 174: ("read", 3), 4096: ("read", 3)}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
