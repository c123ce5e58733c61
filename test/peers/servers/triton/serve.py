"""Runs the Triton of the nvidia-pytriton wheel on loopback with the models beside this file.

Usage: python serve.py --grpc-port N [--metrics-port N] [tritonserver flags]
Run it in a scratch folder, into which the models are copied: Triton's Python leaves bytecode beside
them. Only gRPC is served, on the CPU, and metrics where a port for them is given. The process becomes tritonserver: stop it with SIGTERM.
"""

import argparse
import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytriton

parser = argparse.ArgumentParser()
parser.add_argument("--grpc-port", type=int, required=True)
parser.add_argument("--metrics-port", type=int)
args, flags = parser.parse_known_args()

triton = Path(pytriton.__file__).parent / "tritonserver"
backends = triton / "backends"

# The wheel has one stub for each Python; the backend looks for it in its own folder.
python = f"{sys.version_info.major}.{sys.version_info.minor}"
with contextlib.suppress(FileExistsError):
    (backends / "python" / "triton_python_backend_stub").symlink_to(
        triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    )


def prepend(variable, folder):
    os.environ[variable] = os.pathsep.join(filter(None, [folder, os.environ.get(variable)]))


# The stub embeds libpython. It must load that of this interpreter, not the system's, and it finds
# numpy through the first python on PATH.
prepend("LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR"))
prepend("PATH", os.path.join(sys.prefix, "bin"))

models = Path.cwd() / "models"
shutil.copytree(Path(__file__).parent / "models", models, dirs_exist_ok=True)

metrics = ["--allow-metrics=false"]
if args.metrics_port:
    metrics = [
        "--metrics-address=127.0.0.1",
        f"--metrics-port={args.metrics_port}",
        "--allow-gpu-metrics=false",
    ]

server = str(triton / "bin" / "tritonserver")
os.execv(
    server,
    [
        server,
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={args.grpc_port}",
        "--allow-http=false",
        *metrics,
        *flags,
    ],
)
