"""An endpoint on loopback that speaks OpenAI's chat completions, as a test scripts it."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, **more):
    """The body of an answer."""
    message = {"role": "assistant", "content": content, **more}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}


@contextlib.contextmanager
def chat_server(answer):
    """Serves ``answer(request)`` until the block is left; yields the server.

    The answer is a text, or (status, headers, body). The server's ``requests`` keeps all bodies,
    and ``headers`` all headers, in the order of their coming.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.paths.append(self.path)
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            found = answer(body)
            status, headers, said = (200, {}, found) if isinstance(found, str) else found
            if status == 200 and isinstance(said, str):
                said = completion(said)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths, server.requests, server.headers = [], [], []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def question_of(body):
    (message,) = body["messages"]
    assert message["role"] == "user"
    return message["content"]
