"""How a notebook starts: style, seeds and threads."""

from __future__ import annotations

import numpy as np
import torch

from primia_lite.plotting import use_style
from primia_lite.runtime import seed_for


def setup(seed: int = 0, threads: int = 1) -> None:
    """Prepare a session: figure style, seeds of numpy and torch (never of the DP noise), number of torch's threads.

    One thread by default: a linear head is too small to be shared out, and on a busy machine that costs tenfold. Work
    that is worth it takes all cores by itself (feature extraction, networks that are trained whole).
    """
    use_style()
    np.random.seed(seed_for(seed, "numpy") % 2**32)
    torch.manual_seed(seed_for(seed, "torch"))
    torch.set_num_threads(threads)
