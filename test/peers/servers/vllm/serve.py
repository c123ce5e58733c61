"""Runs vllm.grpc.engine.VllmEngine with the stubs of smg-grpc-proto on loopback.

Usage: python serve.py --grpc-port N
The messages and the server are the real ones; the engine is not: it repeats the words of its
prompts, and a token id is a word's index. Stop it with SIGTERM.
"""

import argparse
import asyncio
import signal
from itertools import cycle, islice

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as services


class Engine(services.VllmEngineServicer):
    async def Generate(self, request, context):
        kind = request.WhichOneof("input")
        if kind is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no input")
        prompt = request.tokenized.input_ids if kind == "tokenized" else request.text.split() or [""]
        limit = request.sampling_params.max_tokens or 16
        ids = list(islice(cycle(range(len(prompt))), limit))
        answers = range(request.sampling_params.n or 1)
        for n, token in enumerate(ids if request.stream else [], 1):
            for index in answers:
                chunk = pb.GenerateStreamChunk(
                    token_ids=[token], prompt_tokens=len(prompt), completion_tokens=n, index=index
                )
                yield pb.GenerateResponse(chunk=chunk)
            await asyncio.sleep(0.002)
        for index in answers:
            complete = pb.GenerateComplete(
                output_ids=ids,
                finish_reason="length",
                prompt_tokens=len(prompt),
                completion_tokens=len(ids),
                index=index,
            )
            yield pb.GenerateResponse(complete=complete)

    async def HealthCheck(self, request, context):
        return pb.HealthCheckResponse(healthy=True, message="ok")

    async def Abort(self, request, context):
        return pb.AbortResponse()

    async def GetModelInfo(self, request, context):
        return pb.GetModelInfoResponse(model_path="words", is_generation=True, max_context_length=2048)


async def ready(request, context):
    return b"\x08\x01"  # {ready: true}


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--grpc-port", type=int, required=True)
    server = grpc.aio.server()
    services.add_VllmEngineServicer_to_server(Engine(), server)
    # The tests ask every server in this way.
    answers = {n: grpc.unary_unary_rpc_method_handler(ready) for n in ("ServerReady", "ModelReady")}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", answers)]
    )
    server.add_insecure_port(f"127.0.0.1:{parser.parse_args().grpc_port}")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(1)


asyncio.run(main())
