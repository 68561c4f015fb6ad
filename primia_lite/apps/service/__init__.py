"""Encrypted diagnosis over HTTP: the model owner's service, and the hospital's client."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"client": ["RemoteServer", "ServiceError"], "commands": ["running"]}
)
