"""CrypTen's side of ``primia-lite bench ckks``, in a process of its own: two parties that share film and weights.

Reads a torch file (list of layers, film, logits), prints a JSON line. CrypTen 0.4.1 imports onnx and a part of torch
that has moved, for converting networks only: they are stood in for.
"""

from __future__ import annotations

import json
import sys
import time
from unittest.mock import MagicMock

sys.path.append(sys.argv[1])
for name in ("onnx", "onnx.numpy_helper", "torch.onnx._internal.registration"):
    try:
        __import__(name)
    except ImportError:
        sys.modules[name] = MagicMock()

import crypten  # noqa: E402
import crypten.communicator as communicator  # noqa: E402
import crypten.mpc as mpc  # noqa: E402
import torch  # noqa: E402


class Square(crypten.nn.Module):
    def forward(self, x):
        return x.square()


def layer(kind: str, weight, bias, stride: int):
    if kind == "square":
        return Square()
    if kind == "flatten":
        return crypten.nn.Flatten(axis=1)
    shape = weight.shape
    if kind == "conv":
        out = crypten.nn.Conv2d(shape[1], shape[0], shape[2], stride=stride)
    else:
        out = crypten.nn.Linear(shape[1], shape[0], bias=bias is not None)
    out.set_parameter("weight", weight)
    if bias is not None:
        out.set_parameter("bias", bias)
    return out


@mpc.run_multiprocess(world_size=2)
def run(path: str, rounds: int):
    torch.set_num_threads(1)
    crypten.cfg.communicator.verbose = True
    given = torch.load(path)
    network = crypten.nn.Sequential(*[layer(*each) for each in given["layers"]])
    network.eval()
    network.encrypt(src=0)
    film, seconds = crypten.cryptensor(given["film"], src=1), []
    network(film).get_plain_text()
    communicator.get().reset_communication_stats()
    for _ in range(rounds):
        started = time.process_time()
        logits = network(film).get_plain_text()
        seconds.append(time.process_time() - started)
    there = communicator.get()
    error = float((logits.double() - given["logits"]).abs().max())
    return {"ms": [1e3 * s for s in seconds], "error": error, "messages": there.comm_rounds / rounds,
            "kib": there.comm_bytes / rounds / 1024}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[2], int(sys.argv[3]))[0]))
