"""Networks by name, features of frozen ones, and films as each network takes them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["catalogue", "frozen", "networks"],
    submod_attrs={
        "catalogue": ["MODELS", "Spec", "build", "check_options", "linear_head", "prepare", "spec", "standardised"],
        "frozen": ["BIAS_INPUT", "EXTRACTORS", "changed_views", "differentiable_features", "features"],
    },
)
