"""Runs MLServer on loopback with the models beside this file.

Usage: python serve.py --grpc-port N
Its HTTP server cannot be left out: it takes any free port. One process; stop it with SIGTERM.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from mlserver import MLServer, Settings
from mlserver.repository.factory import ModelRepositoryFactory

parser = argparse.ArgumentParser()
parser.add_argument("--grpc-port", type=int, required=True)
args = parser.parse_args()

settings = Settings(
    host="127.0.0.1",
    grpc_port=args.grpc_port,
    http_port=0,
    metrics_endpoint=None,  # its server would leave files behind
    parallel_workers=0,
    grpc_max_message_length=64 << 20,
    model_repository_root=str(Path(__file__).parent / "models"),
)


async def main():
    models = await ModelRepositoryFactory.resolve_model_repository(settings).list()
    await MLServer(settings).start(models)


asyncio.run(main())
