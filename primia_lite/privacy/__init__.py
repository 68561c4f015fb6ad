"""Differential privacy: DP-SGD, its noise, what it costs, and the ledger that is charged."""

import lazy_loader

_ACCOUNTING = ["ACCOUNTANTS", "Release", "calibrate_noise_multiplier", "epsilon", "epsilon_bracket", "merge"]
_GUARANTEES = ["federation_epsilon", "group_epsilon", "group_privacy", "selection_epsilon", "tpr_upper_bound"]

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accounting": _ACCOUNTING,
        "accounting.guarantees": _GUARANTEES,
        "dpsgd": ["Privacy", "poisson_batches"],
        "ledger": ["Ledger"],
        "noise": ["discrete_gaussian", "local_noise", "rounded_gaussian"],
        "rng": ["SecureGenerator"],
        "shared": ["SharedNoise"],
    },
)
