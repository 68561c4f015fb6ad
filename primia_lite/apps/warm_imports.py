"""Imported by the process that warm kernels are forked from, once."""

import gc
import os
from contextlib import suppress
from importlib import import_module

from primia_lite.apps.warm import IMPORTS

os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # what ipykernel sets; read at import
for name in IMPORTS:
    with suppress(ImportError):  # the kernel says so, where it is needed
        import_module(name)
gc.freeze()  # a collection in a kernel would write to pages that all share
