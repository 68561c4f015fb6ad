"""Kernels that start warm: forked from a process that has imported what notebooks import.

A fresh kernel spends some 10 CPU seconds on importing (torch, scikit-learn, opacus, matplotlib, pandas); a forked one
shares what its server imported once. Linux only: elsewhere forking with these libraries loaded is not safe.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import wait
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

IMPORTS = (
    "ipykernel.kernelapp", "ipykernel.ipkernel", "ipywidgets", "matplotlib.pyplot", "pandas.io.formats.style",
    "jinja2", "torch", "torch._dynamo", "sklearn.metrics", "scipy.stats", "scipy.signal",
    "efficientnet_lite_pytorch", "primia_lite.session", "primia_lite.data.phantom", "primia_lite.models.frozen",
    "primia_lite.federation.rounds", "primia_lite.privacy.accounting", "opacus.accountants.analysis.rdp",
)  # fmt: skip


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__name__}_imports"])
    return context


def run_kernel(command: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Be a kernel: ``command`` is what would have started one, ``log`` a file for what it prints."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv = command
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=command[command.index("-f") :])


def _end_with_the_run() -> None:
    """However it ends. The kernel's parent is the server, which lives as long as a kernel of it does."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


class Forked:
    """A kernel's process, with what Jupyter asks of ``subprocess.Popen``."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], environment: dict[str, str], folder: str, log: str) -> None:
        self._process = _context().Process(target=run_kernel, args=(command, environment, folder, log), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class WarmProvisioner(LocalProvisioner):
    """Launches kernels as forks of a warm process (Jupyter's entry point ``primia-lite-warm``)."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any):
        if sys.platform != "linux":
            return await super().launch_kernel(cmd, **kwargs)
        log = getattr(kwargs.get("stderr"), "name", os.devnull)
        self.cwd = str(kwargs.get("cwd") or os.getcwd())
        self.process = Forked(cmd, kwargs.get("env") or dict(os.environ), self.cwd, str(log))
        self.pid = self.pgid = self.process.pid  # it leads a group of its own
        return self.connection_info
