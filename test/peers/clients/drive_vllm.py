"""Drives vllm.grpc.engine.VllmEngine with the stubs of smg-grpc-proto."""

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as services

from cases import Recorder, case, equal, main


def ask(prompt, limit, stream=True, **sampling):
    return pb.GenerateRequest(
        request_id="v-1",
        text=prompt,
        stream=stream,
        sampling_params=pb.SamplingParams(temperature=0.0, max_tokens=limit, stop=["END"], **sampling),
    )


@case
def stream(stub):
    r = list(stub.Generate(ask("one two three", 30)))
    equal([i for x in r[:-1] for i in x.chunk.token_ids], [n % 3 for n in range(30)])
    equal((list(r[-1].complete.output_ids), r[-1].complete.prompt_tokens), ([n % 3 for n in range(30)], 3))


@case
def at_once(stub):
    r = list(stub.Generate(ask("one two three", 4, stream=False)))
    equal([list(x.complete.output_ids) for x in r], [[0, 1, 2, 0]])


@case
def several_answers(stub):
    r = list(stub.Generate(ask("one two", 3, n=2)))
    equal([x.chunk.index for x in r if x.HasField("chunk")], [0, 1, 0, 1, 0, 1])
    equal([x.complete.completion_tokens for x in r if x.HasField("complete")], [3, 3])


@case
def guided(stub):
    r = list(stub.Generate(ask("one two", 2, json_schema='{"type": "object"}', logit_bias={5: -1.5})))
    equal(len(r), 3)


@case(keep=4)
def cancelled(stub):
    call = stub.Generate(ask("tick", 5000))
    equal([list(next(call).chunk.token_ids) for _ in range(4)], [[0]] * 4)
    call.cancel()


@case
def no_input(stub):
    try:
        list(stub.Generate(pb.GenerateRequest(request_id="v-3")))
    except grpc.RpcError as e:
        equal((e.code().name, e.details()), ("INVALID_ARGUMENT", "no input"))
        return
    raise AssertionError("the call was not refused")


@case
def model_info(stub):
    equal(stub.GetModelInfo(pb.GetModelInfoRequest()).max_context_length, 2048)


@case
def health(stub):
    equal(stub.HealthCheck(pb.HealthCheckRequest()).healthy, True)


def connect(args, credentials):
    if credentials:
        channel = grpc.secure_channel(args.address, credentials)
    else:
        channel = grpc.insecure_channel(args.address)
    recorder = Recorder(channel)
    return recorder, services.VllmEngineStub(recorder)


main(connect)
