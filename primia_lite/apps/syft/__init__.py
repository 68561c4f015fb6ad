"""A governed federation over PySyft: a researcher asks, hospitals decide, and what they release is masked."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "approval": ["DEPENDENCY_FILES", "difference", "digest", "verdict"],
        "memory": ["in_memory"],
        "researcher": ["federate_with_syft"],
    },
)
