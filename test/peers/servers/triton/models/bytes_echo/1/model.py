"""Gives the elements of a BYTES tensor back, with the length of each. The element "fail" is an error."""

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        text = triton.get_input_tensor_by_name(request, "TEXT").as_numpy()
        if b"fail" in text.flatten().tolist():
            error = triton.TritonError("told to fail", triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(error=error)
        lengths = np.fromiter(map(len, text.flat), np.int32).reshape(text.shape)
        return triton.InferenceResponse(
            [triton.Tensor("TEXT_OUT", text), triton.Tensor("LENGTH", lengths)]
        )
