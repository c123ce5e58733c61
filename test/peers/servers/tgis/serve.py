"""Runs fmaas.GenerationService with the stubs of vllm-tgis-adapter on loopback.

Usage: python serve.py --grpc-port N
The messages and the server are the real ones; the engine is not: it repeats the words of its
prompts, and a word is a token. The model "fails" is unknown. Stop it with SIGTERM.
"""

import argparse
import asyncio
import importlib.util
import pathlib
import signal
import sys
import types
from itertools import cycle, islice

import grpc


def stubs():
    """Loads the adapter's generated modules without the adapter, which needs vLLM."""
    root = importlib.util.find_spec("vllm_tgis_adapter").submodule_search_locations[0]
    for name, folder in (("", ""), (".grpc", "grpc"), (".grpc.pb", "grpc/pb")):
        module = types.ModuleType("vllm_tgis_adapter" + name)
        module.__path__ = [str(pathlib.Path(root) / folder)]
        sys.modules[module.__name__] = module
    from vllm_tgis_adapter.grpc.pb import generation_pb2, generation_pb2_grpc

    return generation_pb2, generation_pb2_grpc


pb, services = stubs()


def answer(prompt, params):
    """The prompt's words and what is answered to them, word by word."""
    words = prompt.split() or ["(empty)"]
    limit = params.stopping.max_new_tokens or 20
    return words, [("" if n == 0 else " ") + w for n, w in enumerate(islice(cycle(words), limit))]


def tokens(params, pieces):
    wanted = params.response.generated_tokens
    return [pb.TokenInfo(text=p, rank=1) for p in pieces] if wanted else []


class Service(services.GenerationServiceServicer):
    async def Generate(self, request, context):
        out = pb.BatchedGenerationResponse()
        for r in request.requests:
            words, pieces = answer(r.text, request.params)
            out.responses.add(
                input_token_count=len(words),
                generated_token_count=len(pieces),
                text="".join(pieces),
                stop_reason=pb.MAX_TOKENS,
                tokens=tokens(request.params, pieces),
            )
        return out

    async def GenerateStream(self, request, context):
        if request.model_id == "fails":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unknown model")
        words, pieces = answer(request.request.text, request.params)
        # As in TGIS, the first message counts the prompt's tokens and has no text.
        yield pb.GenerationResponse(input_token_count=len(words))
        for n, piece in enumerate(pieces, 1):
            yield pb.GenerationResponse(
                generated_token_count=n,
                text=piece,
                stop_reason=pb.MAX_TOKENS if n == len(pieces) else pb.NOT_FINISHED,
                tokens=tokens(request.params, [piece]),
            )
            await asyncio.sleep(0.002)

    async def Tokenize(self, request, context):
        out = pb.BatchedTokenizeResponse()
        for r in request.requests:
            words = r.text.split()
            out.responses.add(token_count=len(words), tokens=words if request.return_tokens else [])
        return out

    async def ModelInfo(self, request, context):
        return pb.ModelInfoResponse(max_sequence_length=2048, max_new_tokens=1024)


async def ready(request, context):
    return b"\x08\x01"  # {ready: true}


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--grpc-port", type=int, required=True)
    server = grpc.aio.server()
    services.add_GenerationServiceServicer_to_server(Service(), server)
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
