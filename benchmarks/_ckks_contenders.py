"""The networks of the benchmark of encrypted inference, and who runs them: ours, TenSEAL, orion-v2, CrypTen."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tenseal
import torch
from _peers import LIMIT_S, install
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.client import CkksClient
from primia_lite.encrypted.server import CkksServer
from primia_lite.models.networks import Square

# --- networks ---------------------------------------------------------------------------------------------------------


def head(features: int) -> nn.Module:
    torch.manual_seed(features)
    return nn.Linear(features, 3, bias=False)


def network(side: int, kernel: int, stride: int, channels: int, hidden: int, classes: int) -> nn.Module:
    torch.manual_seed(side + kernel)
    units = channels * ((side - kernel) // stride + 1) ** 2
    dense = [nn.Linear(units, hidden), Square(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(units, classes)]
    return nn.Sequential(nn.Conv2d(1, channels, kernel, stride), Square(), nn.Flatten(), *dense)


@dataclass(frozen=True)
class Row:
    """A network and who runs it.

    Attributes
    ----------
    slow : one run of these in each round, 10 of the others
    crypten : whether CrypTen runs it, too
    """

    model: nn.Module
    shape: tuple[int, ...]
    contenders: tuple[str, ...]
    crypten: bool = False
    slow: tuple[str, ...] = ("tenseal", "tenseal mm", "orion")

    def film(self, number: int) -> np.ndarray:
        """Features of norm 1, or pixels in [0, 1]."""
        rng = np.random.default_rng(number)
        if len(self.shape) == 2:
            return rng.random(self.shape)
        values = rng.normal(size=self.shape)
        return values / np.linalg.norm(values)

    def plain(self, film: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(film)[None] if film.ndim == 1 else torch.from_numpy(film)[None, None]
        with torch.no_grad():
            return self.model.double()(inputs).numpy()[0]


def rows() -> dict[str, Row]:
    linear, cnn = ("ours", "ours prepared", "tenseal dot", "orion"), ("ours", "tenseal", "orion")
    torch.manual_seed(0)
    return {
        "linear_1280": Row(head(1280), (1280,), (*linear, "tenseal mm"), crypten=True),
        "linear_litenet": Row(head(2369), (2369,), linear),
        "linear_scatternet": Row(head(869), (869,), linear),
        "tutorial": Row(network(28, 7, 3, 4, 64, 10), (28, 28), cnn, crypten=True),
        "quadratic": Row(network(64, 8, 8, 4, 0, 3), (64, 64), cnn, crypten=True),
        # What TenSEAL's im2col makes of these films is larger than a ciphertext.
        "quadratic_overlapping": Row(network(64, 9, 5, 4, 0, 3), (64, 64), ("ours", "orion")),
        # The shape of ckksnet's default, whose norms are folded.
        "ckksnet": Row(network(64, 9, 5, 8, 64, 3), (64, 64), ("ours", "orion")),
    }


# --- contenders -------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One film: ms of each step, logits, bytes to the server and back."""

    ms: dict[str, float]
    logits: np.ndarray
    up: int
    down: int


class Clock:
    """CPU time of this process since the last call, ms: on a core of one's own, the wall clock's."""

    def __init__(self):
        self.last = time.process_time()

    def __call__(self) -> float:
        now = time.process_time()
        passed, self.last = now - self.last, now
        return 1e3 * passed


class Ours:
    def __init__(self, row: Row, prepared: bool = False, batch_size: int = 1):
        self.server, self.prepared = CkksServer(row.model, row.shape, batch_size=batch_size), prepared
        self.client = CkksClient(self.server.packing)
        public = self.client.public()
        self.session, self.key_kib = self.server.open(public), len(public) / 1024

    def __call__(self, film: np.ndarray) -> Sample:
        if self.prepared:
            self.session.prepare()
        server = self.server
        started, clock = time.perf_counter(), Clock()
        upload = self.client.encrypt(film)
        ms = {"encrypt": clock()}
        inputs = server.receive(upload)
        ms["receive"] = clock()
        products = server.kernel(inputs, self.session.keys)
        ms["server"] = clock()
        reply = self.session.seal(products)
        ms["mask"] = clock()
        logits = self.client.decrypt_exact(reply)  # errors are measured before the rounding
        ms["decrypt"] = clock()
        ms |= {"end to end": sum(ms.values()), "end to end, wall": 1e3 * (time.perf_counter() - started)}
        ms["masked"] = ms["server"] + ms["mask"]
        return Sample(ms, logits, sum(map(len, upload)), sum(map(len, reply)))


def tenseal_context(n: int, bits: list[int], scale_bits: int):
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, n, coeff_mod_bit_sizes=bits, n_threads=1)
    context.global_scale = 2.0**scale_bits
    context.generate_galois_keys()
    return context


class TenSEALHead:
    """Its ``dot`` for each class, or ``mm``."""

    def __init__(self, row: Row, how: str):
        self.context, self.how = tenseal_context(8192, [40, 30, 40], 30), how
        weights = row.model.weight.detach().double().numpy()
        self.columns, self.matrix = weights.tolist(), weights.T.tolist()
        self.key_kib = len(self.context.serialize(save_secret_key=False)) / 1024

    def __call__(self, film: np.ndarray) -> Sample:
        values = film.tolist()
        clock = Clock()
        vector = tenseal.ckks_vector(self.context, values)
        ms = {"encrypt": clock()}
        out = [vector.dot(column) for column in self.columns] if self.how == "dot" else [vector.mm(self.matrix)]
        ms["server"] = clock()
        logits = np.concatenate([part.decrypt() for part in out])
        ms["decrypt"] = clock()
        return Sample(ms, logits, len(vector.serialize()), sum(len(part.serialize()) for part in out))


class TenSEALNetwork:
    """The pattern of its tutorial 4, with the tutorial's parameters, or two levels fewer where a hidden layer is."""

    def __init__(self, row: Row):
        conv, *dense = [layer for layer in row.model if hasattr(layer, "weight")]
        levels = 6 if len(dense) == 2 else 4
        self.context = tenseal_context(8192, [31, *[26] * levels, 31], 26)
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.channels = list(zip(conv.weight[:, 0].tolist(), conv.bias.tolist(), strict=True))
        self.dense = [(layer.weight.T.tolist(), layer.bias.tolist()) for layer in dense]
        self.key_kib = len(self.context.serialize(save_secret_key=False)) / 1024

    def __call__(self, film: np.ndarray) -> Sample:
        values = film.tolist()
        clock = Clock()
        vector, windows = tenseal.im2col_encoding(self.context, values, self.kernel, self.kernel, self.stride)
        ms, up = {"encrypt": clock()}, len(vector.serialize())
        clock()
        out = tenseal.CKKSVector.pack_vectors(
            [vector.conv2d_im2col(kernel, windows) + bias for kernel, bias in self.channels]
        )
        for weights, bias in self.dense:
            out.square_()
            out = out.mm(weights) + bias
        ms["server"] = clock()
        logits = np.array(out.decrypt())
        ms["decrypt"] = clock()
        return Sample(ms, logits, up, len(out.serialize()))


def _orion_layer(on, layer: nn.Module):
    if isinstance(layer, (Square, nn.Flatten)):
        return on.Quad() if isinstance(layer, Square) else on.Flatten()
    if isinstance(layer, nn.Conv2d):
        out = on.Conv2d(1, layer.out_channels, layer.kernel_size[0], stride=layer.stride[0])
    else:
        out = on.Linear(layer.in_features, layer.out_features)
    out.weight.data.copy_(layer.weight.data)
    out.bias.data.copy_(layer.bias.data if layer.bias is not None else torch.zeros(layer.out_features))
    return out


class Orion:
    """orion-v2: a compiler in Python, its evaluator on Lattigo."""

    def __init__(self, row: Row):
        sys.path.append(str(install("orion")))
        import orion_compiler.nn as on
        from lattigo import ckks, rlwe
        from orion_compiler import CKKSParams, Compiler
        from orion_evaluator import Evaluator, Model

        class Network(on.Module):
            def __init__(self, layers):
                super().__init__()
                self.names = []
                for number, layer in enumerate(layers):
                    setattr(self, f"layer{number}", layer)
                    self.names.append(f"layer{number}")

            def forward(self, x):
                for name in self.names:
                    x = getattr(self, name)(x)
                return x

        linear = isinstance(row.model, nn.Linear)
        layers = [nn.Flatten(), row.model] if linear else list(row.model)
        if linear:
            degree, primes, scale = 12 if row.shape[0] <= 2048 else 13, [39, 30], 30
        else:
            degree, primes, scale = (13, [36, *[28] * 5], 28) if len(layers) == 6 else (13, [40, 30, 30, 30], 30)
        parameters = CKKSParams(
            ring_type="standard", logn=degree, logq=primes, logp=primes[:1], log_default_scale=scale
        )
        net = Network([_orion_layer(on, layer) for layer in layers]).float().eval()
        shape = (1, 1, *row.shape) if linear else (1, *row.shape)
        fitting = torch.utils.data.TensorDataset(
            torch.stack([torch.from_numpy(row.film(-n - 1 + 1000)).float().reshape(shape) for n in range(16)]),
            torch.zeros(16),
        )
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiler = Compiler(net, parameters)
            compiler.fit(torch.utils.data.DataLoader(fitting, batch_size=1))
            self.model = Model.load(compiler.compile().to_bytes())
        described, manifest, self.level = self.model.client_params()
        self.rlwe, inner = rlwe, ckks.Parameters.from_dict(described)
        generator = rlwe.KeyGenerator(inner)
        secret = generator.gen_secret_key()
        galois = [generator.gen_galois_key(secret, element) for element in manifest["galois_elements"]]
        keys = rlwe.MemEvaluationKeySet(generator.gen_relin_key(secret), galois).marshal_binary()
        self.evaluator, self.encoder = Evaluator(described, keys), ckks.Encoder(inner)
        self.encryptor = rlwe.Encryptor(inner, generator.gen_public_key(secret))
        self.decryptor, self.key_kib = rlwe.Decryptor(inner, secret), len(keys) / 1024

        def value(of):
            return of() if callable(of) else of

        self.slots, self.scale = value(inner.max_slots), value(inner.default_scale)
        self.classes = layers[-1].out_features

    def __call__(self, film: np.ndarray) -> Sample:
        values = np.zeros(self.slots)
        values[: film.size] = film.ravel()
        values = values.tolist()
        clock = Clock()
        upload = self.encryptor.encrypt_new(self.encoder.encode(values, self.level, self.scale)).marshal_binary()
        ms = {"encrypt": clock()}
        [reply] = self.evaluator.forward(self.model, [upload])
        ms["server"] = clock()
        plain = self.decryptor.decrypt_new(self.rlwe.Ciphertext.unmarshal_binary(reply))
        logits = np.array(self.encoder.decode(plain, self.slots))[: self.classes]
        ms["decrypt"] = clock()
        return Sample(ms, logits.real, len(upload), len(reply))


CONTENDERS = {
    "ours": Ours,
    "ours prepared": lambda row: Ours(row, prepared=True),
    "tenseal": TenSEALNetwork,
    "tenseal dot": lambda row: TenSEALHead(row, "dot"),
    "tenseal mm": lambda row: TenSEALHead(row, "mm"),
    "orion": Orion,
}


def crypten(row: Row, rounds: int) -> dict:
    """ms of each run, error, messages and KiB that each party sends."""
    folder, film = install("crypten"), row.film(0)
    layers = [row.model] if isinstance(row.model, nn.Linear) else list(row.model)
    kinds = {nn.Conv2d: "conv", nn.Linear: "linear", Square: "square", nn.Flatten: "flatten"}
    described = []
    for layer in layers:
        weight, bias = (
            None if getattr(layer, name, None) is None else getattr(layer, name).detach().float().clone()
            for name in ("weight", "bias")
        )
        described.append((kinds[type(layer)], weight, bias, layer.stride[0] if isinstance(layer, nn.Conv2d) else 0))
    inputs = torch.from_numpy(film).float().reshape(1, *(() if film.ndim == 1 else (1,)), *film.shape)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "network.pt"
        torch.save({"layers": described, "film": inputs, "logits": torch.from_numpy(row.plain(film))}, path)
        script = Path(__file__).with_name("_crypten.py")
        done = subprocess.run(
            [sys.executable, str(script), str(folder), str(path), str(rounds)],
            capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"doesn't run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
