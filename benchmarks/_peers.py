"""Other libraries that benchmarks compare with: installed the first time, into folders of their own under the cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from primia_lite.config import UserError, cache_dir, check_writable

PEERS = {
    "orion": ("orion-v2-compiler==2.1.8", "orion-v2-evaluator==2.1.8", "orion-v2-lattigo==6.2.4"),
    "sycret": ("sycret==0.2.8",),
    "crypten": ("crypten==0.4.1", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3"),
}
LIMIT_S = 1800  # of pip, and of a peer's run


def install(peer: str) -> Path:
    """Folder with a peer and what it needs besides our own packages.

    Raises
    ------
    UserError
        It doesn't install, and why.
    """
    wanted = PEERS[peer]
    folder = cache_dir() / "peers" / wanted[0].replace("==", "-")
    if folder.is_dir():
        return folder
    print(f"installing {', '.join(wanted)} into {folder}", flush=True)
    check_writable(folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    # Without dependencies: they would bring another torch.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    try:
        done = subprocess.run([*pip, str(partial), *wanted], capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            raise UserError(f"doesn't install: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}")
        partial.rename(folder)
    except subprocess.TimeoutExpired:
        raise UserError(f"doesn't install: pip took more than {LIMIT_S} s") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
