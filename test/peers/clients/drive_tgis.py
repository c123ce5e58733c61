"""Drives fmaas.GenerationService with the stubs of vllm-tgis-adapter."""

import importlib.util
import pathlib
import sys
import types

import grpc

from cases import Recorder, case, equal, main


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


def params(limit, **response):
    return pb.Parameters(
        method=pb.SAMPLE,
        sampling=pb.SamplingParameters(temperature=0.7, top_k=40, top_p=0.9, seed=1),
        stopping=pb.StoppingCriteria(max_new_tokens=limit, stop_sequences=["STOP", "\u505c"]),
        response=pb.ResponseOptions(**response),
        truncate_input_tokens=100,
    )


def ask(prompt, limit, model="words", **response):
    return pb.SingleGenerationRequest(
        model_id=model, request=pb.GenerationRequest(text=prompt), params=params(limit, **response)
    )


@case
def batch(stub):
    prompts = ("tell me of the sea", "gr\u00fc\u00dfe \u65e5\u672c\u8a9e \U0001f600", "")
    r = stub.Generate(
        pb.BatchedGenerationRequest(
            model_id="words",
            params=params(4),
            requests=[pb.GenerationRequest(text=p) for p in prompts],
        )
    )
    equal([x.text for x in r.responses][:2], ["tell me of the", "gr\u00fc\u00dfe \u65e5\u672c\u8a9e \U0001f600 gr\u00fc\u00dfe"])
    equal([x.input_token_count for x in r.responses], [5, 3, 1])


@case
def guided(stub):
    p = params(2)
    p.decoding.json_schema = '{"type": "object", "description": "a sea"}'
    r = stub.Generate(
        pb.BatchedGenerationRequest(
            model_id="words", adapter_id="lora-1", prefix_id="p", params=p,
            requests=[pb.GenerationRequest(text="hi there")],
        )
    )
    equal(r.responses[0].text, "hi there")


@case
def stream(stub):
    r = list(stub.GenerateStream(ask("one two three", 30)))
    equal(r[0].input_token_count, 3)
    equal("".join(x.text for x in r), "one two three " * 9 + "one two three")
    equal((r[-1].generated_token_count, r[-1].stop_reason), (30, pb.MAX_TOKENS))


@case
def stream_with_tokens(stub):
    r = list(stub.GenerateStream(ask("one two", 4, generated_tokens=True)))
    equal([t.text for x in r for t in x.tokens], ["one", " two", " one", " two"])


@case(keep=4)
def cancelled(stub):
    call = stub.GenerateStream(ask("tick", 5000))
    equal([next(call).text for _ in range(4)], ["", "tick", " tick", " tick"])
    call.cancel()


@case
def unknown_model(stub):
    try:
        list(stub.GenerateStream(ask("x", 3, model="fails")))
    except grpc.RpcError as e:
        equal((e.code().name, e.details()), ("INVALID_ARGUMENT", "unknown model"))
        return
    raise AssertionError("the call was not refused")


@case
def tokenize(stub):
    r = stub.Tokenize(
        pb.BatchedTokenizeRequest(
            model_id="words", return_tokens=True, requests=[pb.TokenizeRequest(text="a b c")]
        )
    )
    equal((r.responses[0].token_count, list(r.responses[0].tokens)), (3, ["a", "b", "c"]))


@case
def model_info(stub):
    equal(stub.ModelInfo(pb.ModelInfoRequest(model_id="words")).max_sequence_length, 2048)


def connect(args, credentials):
    if credentials:
        channel = grpc.secure_channel(args.address, credentials)
    else:
        channel = grpc.insecure_channel(args.address)
    recorder = Recorder(channel)
    return recorder, services.GenerationServiceStub(recorder)


main(connect)
