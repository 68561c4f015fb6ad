"""CrypTen's side of ``primia-lite bench smpc``, in a process of its own: two parties run a program's steps.

Reads a torch file (program, weights, film), prints a JSON line. Stand-ins as in ``_crypten.py``.
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

from primia_lite.smpc.engines import Engine, Wire  # noqa: E402
from primia_lite.smpc.program import Program  # noqa: E402
from primia_lite.smpc.program import run as run_program  # noqa: E402


class CrypTen(Engine):
    """A program's steps on CrypTen's tensors."""

    def __init__(self, weights: dict) -> None:
        self.weights = {name: [crypten.cryptensor(t, src=0) for t in pair] for name, pair in weights.items()}

    def conv(self, x, name, stride=1, padding=0, groups=1):
        weight, bias = self.weights[name]
        if weight.dim() == 2:
            out = x.share.matmul(weight.t()) + bias
        else:
            out = x.share.conv2d(weight, stride=stride, padding=padding, groups=groups) + bias.reshape(1, -1, 1, 1)
        return Wire(out.size(), out)

    def select(self, y, gate):
        return Wire(y.shape, y.share.relu()) if gate.thresholds else y

    def lift(self, a, by):
        return a

    def sum_pool(self, x):
        out = x.share.sum(3).sum(2)
        return Wire(out.size(), out)

    def max_pool(self, y):
        out = y.share.max_pool2d(3, stride=2, padding=1)
        return Wire(out.size(), out)


@mpc.run_multiprocess(world_size=2)
def infer(path: str):
    torch.set_num_threads(1)
    crypten.cfg.communicator.verbose = True
    given = torch.load(path)
    program, engine = Program.from_json(given["program"]), CrypTen(given["weights"])
    film = crypten.cryptensor(given["film"], src=1)
    communicator.get().reset_communication_stats()
    began = time.process_time()
    logits = run_program(program, engine, Wire(given["film"].shape, film)).share.get_plain_text()
    there = communicator.get()
    return {"cpu_s": time.process_time() - began, "bytes": there.comm_bytes, "rounds": there.comm_rounds,
            "logits": logits.tolist()}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(infer(sys.argv[2])[0]))
