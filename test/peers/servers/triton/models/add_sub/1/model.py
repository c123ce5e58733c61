"""The sum and the difference of two vectors: traffic without any text in it."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        a, b = (
            triton.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("INPUT0", "INPUT1")
        )
        return triton.InferenceResponse(
            [triton.Tensor("OUTPUT0", a + b), triton.Tensor("OUTPUT1", a - b)]
        )
