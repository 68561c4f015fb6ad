"""Hospitals train together: what each releases, the rounds, and how updates become one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "aggregation": ["Aggregate", "Aggregator", "SecureAggregation", "WeightedMean", "flat", "unflat"],
        "hospital": ["Hospital", "Update", "declare_size", "local_update"],
        "normalisation": ["mean_and_std_under_dp"],
        "optimizer": ["Schedule", "ServerOptimizer"],
        "rounds": ["Result", "federate", "planned_epsilon", "pool"],
        "study": ["REQUEST", "ROUND", "RUN_SH", "Study", "job_code", "round_file"],
    },
)
