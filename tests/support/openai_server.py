"""A small HTTP server in place of an OpenAI-compatible one."""

import http.server
import json
import threading
from contextlib import contextmanager
from types import SimpleNamespace

DROPPED = None
"""Close the connection without a response."""


def failure(status, message, **headers):
    return status, headers, json.dumps({"error": {"message": message}})


class FakeServer:
    """A server that keeps its requests and answers POST requests with `answer(body)`: status, headers and text."""

    def __init__(self, answer):
        self.requests = []
        self.answer = answer
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(SimpleNamespace(path=self.path, headers=dict(self.headers), body=body))
                response = outer.answer(body)
                if response is DROPPED:
                    self.close_connection = True
                    return
                status, headers, text = response
                self.send_response(status)
                for name, value in {"Content-Length": len(text.encode()), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.http.serve_forever, args=[0.01])
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join()
