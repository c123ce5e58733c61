"""Speaks as the TensorRT-LLM ensemble does, and repeats the words of its prompt: a word is a token.

Shapes are [1, n]. A stream ends with an empty final response, which Triton keeps from a client that
did not ask for it. A stop word ends the answer and is not said.
"""

import itertools

import numpy as np
import triton_python_backend_utils as triton

FINAL = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Inference:
    def __init__(self, request):
        self.request = request
        self.sender = request.get_response_sender()

    def tensor(self, name):
        t = triton.get_input_tensor_by_name(self.request, name)
        return [] if t is None else t.as_numpy().flatten().tolist()

    def say(self, text, asked, produced, flags=0):
        out = [triton.Tensor("text_output", np.array([[text]], np.object_))]
        for name, count in (("num_input_tokens", asked), ("num_output_tokens", produced)):
            if self.tensor("return_" + name) == [True]:
                out.append(triton.Tensor(name, np.array([[count]], np.int32)))
        self.sender.send(triton.InferenceResponse(out), flags=flags)

    def run(self):
        prompt = self.tensor("text_input")[0].split() or [b"(empty)"]
        words = itertools.islice(itertools.cycle(prompt), self.tensor("max_tokens")[0])
        stop = self.tensor("stop_words")
        words = list(itertools.takewhile(lambda w: w not in stop, words))
        if self.tensor("stream") != [True]:
            self.say(b" ".join(words), len(prompt), len(words), FINAL)
            return
        for n, word in enumerate(words):
            self.say(word if n == 0 else b" " + word, len(prompt), 1)
        self.sender.send(flags=FINAL)


class TritonPythonModel:
    def execute(self, requests):
        for r in requests:
            Inference(r).run()
