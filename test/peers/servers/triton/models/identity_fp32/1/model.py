"""Gives its tensor back: for messages of megabytes."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        x = triton.get_input_tensor_by_name(request, "INPUT0").as_numpy()
        return triton.InferenceResponse([triton.Tensor("OUTPUT0", x)])
