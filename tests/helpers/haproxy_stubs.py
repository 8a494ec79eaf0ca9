"""What stands behind HAProxy in tests: an HTTP and a gRPC server that tell what reached them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from ray.serve.generated import serve_pb2


class _Echo(BaseHTTPRequestHandler):
    """Answers with the request's headers; at `/drip` line by line until told to go on."""

    protocol_version = "HTTP/1.1"
    go_on = threading.Event()

    def do_GET(self):
        if self.path == "/drip":
            return self._drip()
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def _drip(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"first\n")
        self.go_on.wait(60)
        self.wfile.write(b"last\n")
        self.close_connection = True

    def log_message(self, *_):
        pass


class _EchoMetadata(grpc.GenericRpcHandler):
    """Answers every method with the call's metadata; Serve's health check as it wants it."""

    def service(self, details):
        if details.method.endswith("/Healthz"):
            answer = serve_pb2.HealthzResponse(message="success").SerializeToString()
            return grpc.unary_unary_rpc_method_handler(lambda *_: answer)
        return grpc.unary_unary_rpc_method_handler(_metadata)


def _metadata(_request, context):
    return json.dumps({key: str(value) for key, value in context.invocation_metadata()}).encode()


@contextmanager
def backends() -> Iterator[tuple[int, int, threading.Event]]:
    """Ports of both servers, and the event that lets `/drip` end."""
    _Echo.go_on = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server = grpc.server(ThreadPoolExecutor(4), handlers=[_EchoMetadata()])
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield http.server_port, grpc_port, _Echo.go_on
    finally:
        _Echo.go_on.set()
        server.stop(None).wait(10)
        http.shutdown()
        http.server_close()
        thread.join(10)
