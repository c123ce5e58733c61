"""Drives Triton through a gateway that redacts cards in prompts, and addresses and accounts in outputs.

Every model says what it was told, and bytes_echo how long that was: so what arrives tells what the
model got, and what was changed after it.
"""

import numpy as np
import tritonclient.grpc as tc
from tritonclient.grpc import service_pb2 as pb

from cases import CASES, DEADLINE, case, equal, main
from drive_triton import connect, echo, texts, vllm

CASES.clear()  # those of drive_triton

CARD, HIDDEN_CARD = "pay 4111 1111 1111 1111 now", "pay [redacted:card] now"
MAIL, HIDDEN_MAIL = "write to bob.roe@example.com today", "write to [redacted:email] today"
ACCOUNT, HIDDEN_ACCOUNT = "send it to GB82 WEST 1234 5698 7654 32 today", "send it to [redacted:iban] today"


def whole(response):
    """Checks that the data of every output fill its shape, and that there are no others."""
    equal(len(response.raw_output_contents), len(response.outputs))
    for output, raw in zip(response.outputs, response.raw_output_contents):
        elements = int(np.prod(output.shape))
        if output.datatype == "BYTES":
            count = 0
            while raw:
                size = int.from_bytes(raw[:4], "little")
                assert len(raw) >= 4 + size, "an element goes past the end"
                raw, count = raw[4 + size :], count + 1
            equal(count, elements)
        else:
            equal(len(raw), elements * {"INT32": 4, "UINT8": 1}[output.datatype])


def said(result, want, lengths):
    """Checks the texts, and how long they were when the model had them."""
    whole(result.get_response())
    text = result.as_numpy("TEXT_OUT")
    equal([v.decode() for v in text.flat], want)
    equal(result.as_numpy("LENGTH").flatten().tolist(), lengths)
    equal(result.as_numpy("LENGTH").shape, text.shape)


@case
def untouched(peer):
    said(peer.infer("bytes_echo", echo("hello", "", "4111")), ["hello", "", "4111"], [5, 0, 4])


@case
def prompt(peer):
    r = peer.infer("bytes_echo", echo("hello", CARD, "", "bye"), request_id="r-1")
    said(r, ["hello", HIDDEN_CARD, "", "bye"], [5, len(HIDDEN_CARD), 0, 3])


@case
def prompt_in_a_batch(peer):
    r = peer.infer("bytes_echo", echo("a", CARD, CARD + CARD, "b", shape=[2, 2]))
    twice = HIDDEN_CARD + HIDDEN_CARD
    said(r, ["a", HIDDEN_CARD, twice, "b"], [1, len(HIDDEN_CARD), len(twice), 1])
    equal(r.as_numpy("TEXT_OUT").shape, (2, 2))


@case
def prompt_over_elements(peer):
    r = peer.infer("bytes_echo", echo("pay 4111 11", "11 1111", " 1111 now"))
    said(r, ["pay [redacted:card]", "", " now"], [len("pay [redacted:card]"), 0, 4])


@case
def prompt_compressed(peer):
    r = peer.infer("bytes_echo", echo(CARD * 50), compression_algorithm="gzip")
    said(r, [HIDDEN_CARD * 50], [50 * len(HIDDEN_CARD)])


@case
def prompt_typed(peer):
    """With neighbours that stay as they are."""
    q = pb.ModelInferRequest(model_name="bytes_echo", id="typed-1")
    for name, datatype, field, values in (
        ("IDS", "INT64", "int64_contents", [-1, 1 << 40]),
        ("TEXT", "BYTES", "bytes_contents", [CARD.encode(), "\u65e5\u672c".encode()]),
        ("FLAGS", "UINT8", "uint_contents", [52, 255]),
    ):
        t = q.inputs.add(name=name, datatype=datatype, shape=[1, 2])
        getattr(t.contents, field).extend(values)
    r = peer.stub.ModelInfer(q, timeout=DEADLINE)
    said(tc.InferResult(r), [HIDDEN_CARD, "\u65e5\u672c"], [len(HIDDEN_CARD), 6])


@case
def parameters(peer):
    r = peer.infer("bytes_echo", echo("x"), parameters={"note": CARD, "count": 7}, request_id="p-1")
    said(r, ["x"], [1])


@case
def output(peer):
    r = peer.infer("bytes_echo", echo("hello", MAIL, ACCOUNT, "bye"))
    said(r, ["hello", HIDDEN_MAIL, HIDDEN_ACCOUNT, "bye"], [5, len(MAIL), len(ACCOUNT), 3])


@case
def prompt_and_output(peer):
    r = peer.infer("bytes_echo", echo(CARD + " or " + MAIL))
    said(r, [HIDDEN_CARD + " or " + HIDDEN_MAIL], [len(HIDDEN_CARD + " or " + MAIL)])


@case
def one_output_of_two(peer):
    r = peer.infer("bytes_echo", echo(MAIL), outputs=[tc.InferRequestedOutput("TEXT_OUT")])
    whole(r.get_response())
    equal(r.as_numpy("TEXT_OUT").flat[0].decode(), HIDDEN_MAIL)


@case
def on_a_stream(peer):
    got = peer.stream(
        ("bytes_echo", echo(CARD, "x"), {"request_id": "1"}), ("bytes_echo", echo(MAIL), {"request_id": "2"}),
        answers=2,
    )  # fmt: skip
    got = {r.get_response().id: r for r, _ in got}
    said(got["1"], [HIDDEN_CARD, "x"], [len(HIDDEN_CARD), 1])
    said(got["2"], [HIDDEN_MAIL], [len(MAIL)])


@case
def prompt_of_a_streamed_answer(peer):
    got = peer.stream(("vllm_like", vllm(CARD, sampling={"max_tokens": 3}), {"request_id": "s-1"}), answers=3)
    equal("".join(texts(got)["s-1"]), HIDDEN_CARD)


@case
def streamed_output(peer):
    """What is redacted lies over several answers; all of them arrive, each in its shape."""
    inputs = vllm(ACCOUNT, sampling={"max_tokens": 10}, want=("num_output_tokens",))
    got = peer.stream(("vllm_like", inputs, {"request_id": "s-2"}), answers=10)
    equal("".join(texts(got)["s-2"]), HIDDEN_ACCOUNT)
    for r, _ in got:
        equal(r.as_numpy("text_output").shape, (1,))
        equal(r.as_numpy("num_output_tokens").tolist(), [1])


def coded(result, want, length):
    whole(result.get_response())
    codes = result.as_numpy("CODES_OUT")
    equal((codes.shape, codes.tobytes().decode()), ((1, length), want))


def codes(text):
    t = tc.InferInput("CODES", [1, len(text)], "UINT8")
    t.set_data_from_numpy(np.frombuffer(text.encode(), np.uint8).reshape(1, -1))
    return [t]


@case
def text_of_numbers(peer):
    """A tensor of bytes keeps its length: spaces fill it up."""
    coded(peer.infer("codes_echo", codes(CARD)), "pay [redacted:card]     now", len(CARD))
    short = "to a@b.co and " + MAIL
    coded(peer.infer("codes_echo", codes(short)),
          "to ****** and write to [redacted:email]    today", len(short))  # fmt: skip


@case
def text_of_typed_numbers(peer):
    q = pb.ModelInferRequest(model_name="codes_echo", id="codes-1")
    t = q.inputs.add(name="CODES", datatype="UINT8", shape=[1, len(CARD) + 2])
    t.contents.uint_contents.extend(CARD.encode() + "\u00e9".encode())
    r = peer.stub.ModelInfer(q, timeout=DEADLINE)
    coded(tc.InferResult(r), "pay [redacted:card]     now\u00e9", len(CARD) + 2)


if __name__ == "__main__":
    main(connect)
