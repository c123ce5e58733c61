"""Cases that a client runs against a server, and what came back over the wire.

A driver imports this, registers its cases with @case and calls main(). For every case one line of
JSON is printed:

    {"case": "add_sub", "failed": null, "concurrent": false, "rpcs": [{
        "method": "ModelInfer", "code": "OK", "details": "", "trailers": [],
        "answers": [{"id": "num-1", "bytes": 66, "sha256": "..."}]}]}

failed is the first assertion of the case that did not hold. concurrent says that several inferences
shared a stream, so that only the order within one id means anything. sha256 is that of the answer
as it was on the wire, before the client decoded it. Where a map of the answer has several entries,
whose order a protobuf writer may choose at each writing, it is that of the answer written again in
the order of the keys.
"""

import argparse
import asyncio
import hashlib
import inspect
import json
import sys
import traceback
from operator import itemgetter
from types import SimpleNamespace

import grpc

# No case waits longer than this for an answer, in seconds.
DEADLINE = 60
CASES = {}


def case(f=None, *, concurrent=False, keep=None):
    """Registers a case. keep: how many answers are compared, where a cancel ends the rest."""
    if f is None:
        return lambda f: case(f, concurrent=concurrent, keep=keep)
    CASES[f.__name__] = SimpleNamespace(run=f, concurrent=concurrent, keep=keep)
    return f


def equal(got, want):
    if got != want:
        raise AssertionError(f"got {got!r}, want {want!r}")


class Recorder:
    """A gRPC channel that notes the calls made through it and the bytes of their answers."""

    def __init__(self, channel):
        self.channel = channel
        self.rpcs = []

    def __getattr__(self, name):
        return getattr(self.channel, name)

    def unary_unary(self, *args, **kwargs):
        return self._callable("unary_unary", *args, **kwargs)

    def unary_stream(self, *args, **kwargs):
        return self._callable("unary_stream", *args, **kwargs)

    def stream_stream(self, *args, **kwargs):
        return self._callable("stream_stream", *args, **kwargs)

    def _callable(self, kind, method, request_serializer, response_deserializer, **kwargs):
        def call(*args, **callargs):
            rpc = SimpleNamespace(method=method.rsplit("/", 1)[-1], answers=[], call=None)
            self.rpcs.append(rpc)

            def deserialize(data):
                message = response_deserializer(data)
                rpc.answers.append(answer(message, data))
                return message

            invoke = getattr(self.channel, kind)(method, request_serializer, deserialize, **kwargs)
            if not hasattr(invoke, "with_call"):  # a stream, or asyncio: gives the call itself
                rpc.call = invoke(*args, **callargs)
                return rpc.call
            try:
                message, rpc.call = invoke.with_call(*args, **callargs)
            except grpc.RpcError as e:
                rpc.call = e
                raise
            return message

        return call

    async def report(self, keep):
        """Returns what happened since the last report. The calls must have ended."""
        rpcs, self.rpcs = self.rpcs, []
        return [await report(rpc, keep) for rpc in rpcs]


async def report(rpc, keep):
    trailers = await done(rpc.call.trailing_metadata()) or ()
    return {
        "method": rpc.method,
        "code": (await done(rpc.call.code())).name,
        # What ended at this side has a text that is not the server's.
        "details": "" if keep else await done(rpc.call.details()),
        # In the order of the keys: only the order of one key's values means anything.
        "trailers": sorted(([k, str(v)] for k, v in trailers), key=itemgetter(0)),
        "answers": rpc.answers[:keep],
    }


async def done(value):
    return await value if inspect.isawaitable(value) else value


def answer(message, data):
    if ambiguous(message):
        data = message.SerializeToString(deterministic=True)
    inner = getattr(message, "infer_response", message)
    return {
        "id": getattr(inner, "id", ""),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def ambiguous(message):
    """Says whether a map of the message, however deep, has more than one entry."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"].message_type
            if len(value) > 1 or (inner and any(map(ambiguous, value.values()))):
                return True
        elif any(map(ambiguous, value if hasattr(value, "add") else [value])):
            return True
    return False


def options():
    """Returns the command line: where the server is, and the PEM files to reach it by mTLS."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    for name, text in (
        ("--bundle", "the server's authorities; without this the connection is plaintext"),
        ("--certificate", "our certificate, leaf first"),
        ("--key", "its private key"),
    ):
        parser.add_argument(name, help=text)
    parser.add_argument("case", nargs="*", help="run only these")
    return parser.parse_args()


def credentials(args):
    """Returns the channel credentials that the options ask for; None is plaintext."""
    if not args.bundle:
        return None
    bundle, key, certificate = (
        open(path, "rb").read() for path in (args.bundle, args.key, args.certificate)
    )
    return grpc.ssl_channel_credentials(bundle, key, certificate)


async def run(args, recorder, peer):
    for name in args.case or CASES:
        c, failed = CASES[name], None
        try:
            await done(c.run(peer))
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            failed = f"{type(e).__name__}: {e} (line {where.lineno} of {where.filename})"
        line = {"case": name, "failed": failed, "concurrent": c.concurrent}
        print(json.dumps(line | {"rpcs": await recorder.report(c.keep)}), flush=True)


def main(connect):
    """Runs the cases. connect(args, credentials) returns a Recorder and what the cases are given."""

    async def start():
        args = options()
        await run(args, *connect(args, credentials(args)))

    if sys.flags.optimize:
        sys.exit("the cases are asserted: run without -O")
    asyncio.run(start())
