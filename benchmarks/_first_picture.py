"""Prints after how many seconds notebook 00 shows its first picture: a kernel started and cells run as by *Run All*."""

import time

import nbformat
from jupyter_client.manager import start_new_kernel

from primia_lite.apps.notebook import WAIT_S, own_kernel
from primia_lite.config import repo_root


def main() -> None:
    folder = repo_root() / "notebooks"
    notebook = nbformat.read(folder / "00_start_here.ipynb", as_version=4)
    shown: list[float] = []

    def look(message: dict) -> None:
        if any(kind.startswith("image/") for kind in message["content"].get("data", {})):
            shown.append(time.perf_counter())

    with own_kernel():
        started = time.perf_counter()
        manager, client = start_new_kernel(startup_timeout=WAIT_S, cwd=str(folder))
        try:
            for cell in notebook.cells:
                if cell.cell_type == "code" and not shown:
                    client.execute_interactive(cell.source, output_hook=look, timeout=WAIT_S)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    print(f"{shown[0] - started:.2f}")


if __name__ == "__main__":
    main()
