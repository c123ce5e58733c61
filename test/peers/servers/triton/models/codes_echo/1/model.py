"""Gives a text back that comes as the codes of its bytes."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [
            triton.InferenceResponse(
                [triton.Tensor("CODES_OUT", triton.get_input_tensor_by_name(r, "CODES").as_numpy())]
            )
            for r in requests
        ]
