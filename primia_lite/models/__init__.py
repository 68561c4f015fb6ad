"""Networks by name, features of frozen ones, and films as each network takes them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["catalogue", "frozen", "networks"],
    submod_attrs={
        "catalogue": ["build", "check_options", "prepare", "spec"],
        "frozen": ["BIAS_INPUT", "changed_views", "differentiable_features", "features"],
    },
)
