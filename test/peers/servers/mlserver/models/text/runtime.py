"""Repeats the words of its prompts, in one answer or one word a message: a word is a token.

max_tokens is a request parameter (default 16). Both token counts are response parameters.
"""

from itertools import cycle, islice

from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse, Parameters


class Text(MLModel):
    async def load(self):
        return True

    def read(self, request):
        """Returns the words that answer each prompt, and how many words were asked."""
        prompts = [
            prompt.split() or ["(empty)"]
            for tensor in request.inputs
            if tensor.name == "text_input"
            for prompt in self.decode(tensor, default_codec=StringCodec)
        ]
        if not prompts:
            raise InferenceError("no tensor text_input")
        limit = getattr(request.parameters, "max_tokens", 16)
        answers = [list(islice(cycle(words), int(limit))) for words in prompts]
        return answers, sum(map(len, prompts))

    def response(self, request, texts, asked, produced):
        return InferenceResponse(
            id=request.id,
            model_name=self.name,
            model_version=self.version,
            parameters=Parameters(num_input_tokens=asked, num_output_tokens=produced),
            outputs=[StringCodec.encode_output("text_output", texts)],
        )

    async def predict(self, request):
        answers, asked = self.read(request)
        return self.response(
            request, [" ".join(a) for a in answers], asked, sum(map(len, answers))
        )

    async def predict_stream(self, requests):
        async for request in requests:
            (answer, *_), asked = self.read(request)
            for n, word in enumerate(answer):
                yield self.response(request, [word if n == 0 else " " + word], asked, 1)
