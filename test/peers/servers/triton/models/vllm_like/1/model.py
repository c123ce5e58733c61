"""Speaks as Triton's vLLM back end does, and repeats the words of its prompt: a word is a token.

Its last chunk carries the final flag. Sampling parameters are JSON in a tensor, or else the
request's own parameters: max_tokens (default 16), and delay_ms between chunks (default 0; not
vLLM's). When a call is cancelled the log says so.
"""

import itertools
import json
import threading
import time

import numpy as np
import triton_python_backend_utils as triton

FINAL = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Inference:
    def __init__(self, request):
        self.request = request
        self.sender = request.get_response_sender()

    def tensor(self, name, default=None):
        t = triton.get_input_tensor_by_name(self.request, name)
        return default if t is None else t.as_numpy().flat[0]

    def fail(self, *error):
        error = triton.TritonError(*error)
        self.sender.send(triton.InferenceResponse(error=error), flags=FINAL)

    def say(self, text, tokens, reason=None):
        """Sends text. With a reason it is the last."""
        out = [triton.Tensor("text_output", np.array([text.encode()], np.object_))]
        if self.tensor("return_finish_reason"):
            out.append(triton.Tensor("finish_reason", np.array([str(reason).encode()], np.object_)))
        if self.tensor("return_num_input_tokens"):
            asked = len(self.tensor("text_input").split())
            out.append(triton.Tensor("num_input_tokens", np.array([asked], np.uint32)))
        if self.tensor("return_num_output_tokens"):
            out.append(triton.Tensor("num_output_tokens", np.array([tokens], np.uint32)))
        self.sender.send(triton.InferenceResponse(out), flags=FINAL if reason else 0)

    def run(self):
        streaming = bool(self.tensor("stream", False))
        echo = not self.tensor("exclude_input_in_output", streaming)
        try:
            sampling = self.tensor("sampling_parameters")
            if sampling is None:
                sampling = self.request.parameters() or "{}"
            sampling = json.loads(sampling)
            prompt = self.tensor("text_input").decode()
            limit = int(sampling.get("max_tokens", 16))
            pause = float(sampling.get("delay_ms", 0)) / 1000
            if limit < 1:
                raise ValueError("max_tokens must be at least 1")
            if streaming and echo:
                raise ValueError("exclude_input_in_output must be true when streaming")
        except ValueError as e:
            self.fail(f"Error generating stream: {e}")
            return

        words = itertools.cycle(prompt.split() or ["(empty)"])
        said = []
        for n, word in enumerate(itertools.islice(words, limit), 1):
            if self.sender.is_cancelled():
                triton.Logger.log_info(
                    f"vllm_like: cancelled after {n - 1} of {limit} words: {self.request.request_id()}"
                )
                self.fail("cancelled", triton.TritonError.CANCELLED)
                return
            said.append(word if n == 1 else " " + word)
            if streaming:
                self.say(said[-1], 1, "length" if n == limit else None)
            time.sleep(pause)
        if not streaming:
            self.say((prompt if echo else "") + "".join(said), limit, "length")


class TritonPythonModel:
    def execute(self, requests):
        for r in requests:
            threading.Thread(target=Inference(r).run, daemon=True).start()
