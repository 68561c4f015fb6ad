"""For `make test-notebooks`: warm kernels, and patience for a busy machine."""

from contextlib import ExitStack

from primia_lite.apps.notebook import own_kernel

kernels = ExitStack()


def pytest_configure(config):
    kernels.enter_context(own_kernel(warm=True))


def pytest_unconfigure(config):
    kernels.close()


def pytest_itemcollected(item):
    if hasattr(item, "output_timeout"):
        item.output_timeout = 600  # s; nbval waits 5 s for a cell's outputs
