"""Differential privacy: DP-SGD, its noise, what it costs, and the ledger that is charged."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accounting": ["ACCOUNTANTS", "Bracket", "Release", "attacker_power", "calibrate_noise_multiplier", "child_epsilon", "epsilon", "epsilon_bracket", "federation_epsilon", "group_privacy", "merge", "selection_epsilon"],
        "dpsgd": ["Privacy", "poisson_batches"],
        "ledger": ["Ledger"],
        "noise": ["discrete_gaussian", "local_noise", "rounded_gaussian"],
        "rng": ["SecureGenerator"],
        "shared": ["SharedNoise"],
    },
)
