"""Runs the gRPC server of KServe's Python model server on loopback, with two models.

Usage: python serve.py --grpc-port N
text repeats the words of its prompts: a word is a token, and max_tokens a request parameter
(default 16). double is arithmetic. KServe's ModelServer would also start an HTTP server, and both
on every interface; this takes only its gRPC half. Stop it with SIGTERM.
"""

import argparse
import asyncio
from itertools import cycle, islice

import grpc
import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelRepository
from kserve.errors import InvalidInput
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension


def output(name, datatype, array):
    tensor = InferOutput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


class Text(Model):
    async def predict(self, request, headers=None, response_headers=None):
        tensor = next((t for t in request.inputs if t.name == "text_input"), None)
        if tensor is None:
            raise InvalidInput("no tensor text_input")
        prompts = [
            (p.decode() if isinstance(p, bytes) else p).split() or ["(empty)"]
            for p in tensor.as_numpy().flat
        ]
        limit = (request.parameters or {}).get("max_tokens", 16)
        limit = int(getattr(limit, "int64_param", limit))
        texts = [" ".join(islice(cycle(words), limit)) for words in prompts]
        return InferResponse(
            response_id=request.id,
            model_name=self.name,
            infer_outputs=[
                output("text_output", "BYTES", np.array([t.encode() for t in texts], np.object_))
            ],
            parameters={
                "num_input_tokens": sum(map(len, prompts)),
                "num_output_tokens": limit * len(texts),
            },
        )


class Double(Model):
    async def predict(self, request, headers=None, response_headers=None):
        x = request.inputs[0].as_numpy()
        return InferResponse(
            response_id=request.id,
            model_name=self.name,
            infer_outputs=[output("y", "FP32", (2 * x).astype(np.float32))],
        )


def on_loopback(make):
    """Wraps grpc.aio.server: KServe has no option for the address that it listens on."""

    def wrapped(*args, **kwargs):
        server = make(*args, **kwargs)
        bind = server.add_insecure_port
        server.add_insecure_port = lambda address: bind(address.replace("[::]", "127.0.0.1"))
        return server

    return wrapped


parser = argparse.ArgumentParser()
parser.add_argument("--grpc-port", type=int, required=True)
args = parser.parse_args()

grpc.aio.server = on_loopback(grpc.aio.server)
models = ModelRepository()
for model in (Text("text"), Double("double")):
    model.load()
    models.update(model)
limits = {"grpc_max_send_message_length": 64 << 20, "grpc_max_receive_message_length": 64 << 20}
server = GRPCServer(args.grpc_port, DataPlane(models), ModelRepositoryExtension(models), limits)
asyncio.run(server.start(max_workers=2))
