"""Takes as long as it is told, and says so."""

import time

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        seconds = triton.get_input_tensor_by_name(request, "SECONDS").as_numpy()
        time.sleep(float(seconds[0]))
        return triton.InferenceResponse([triton.Tensor("WAITED", seconds)])
