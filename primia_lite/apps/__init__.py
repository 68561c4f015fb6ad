"""Programs that use the library: the command line and its runner, the service, PySyft, Flower. Never imported by it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["flower", "service", "syft"])
