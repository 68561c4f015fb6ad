"""Private machine learning on chest films, end to end, on a laptop: the names that a chapter needs.

>>> import primia_lite as pl
>>> pl.setup(seed=0)
>>> films = pl.load("phantom", 64, n_films=300)

====================  ==================================================================================
films                 ``load``, ``split_by_patient``, ``partition``, ``assign_hospitals``, ``prepare``
training              ``Training``, ``local_update``, ``predict``, ``Schedule``, ``Hospital``, ``federate``
privacy               ``Privacy``, ``epsilon``, ``calibrate_noise_multiplier``, ``Ledger``, ``SecureGenerator``
secure sums           ``SecureAggregation``
encrypted diagnosis   ``ModelCard``, ``prepare_film``
audits                ``audit``
pictures              ``film_grid``, ``show_films``, ``save_figure``, ``source_note``, ``explore``
the session           ``setup``, ``runs_dir``, ``UserError``; ``stored`` results, ``check`` of an exercise
====================  ==================================================================================

Each chapter has a subpackage or module of its own: ``data``, ``phantom``, ``models``, ``metrics``, ``plotting``,
``privacy``, ``federation``, ``secagg``, ``encrypted``, ``smpc``, ``attacks``, ``widgets``. Programs that use
them: ``apps``.
A name is loaded when it is first used, so that importing this costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "apps", "attacks", "config", "data", "encrypted", "exercises", "federation", "metrics", "models", "phantom",
        "plotting", "privacy", "runtime", "secagg", "smpc", "training", "widgets",
    ],
    submod_attrs={
        "attacks.auditing": ["audit"],
        "config": ["UserError", "runs_dir"],
        "data": ["assign_hospitals", "load", "partition", "split_by_patient"],
        "encrypted.model_card": ["ModelCard", "prepare_film"],
        "exercises": ["check"],
        "federation.aggregation": ["SecureAggregation"],
        "federation.hospital": ["Hospital", "local_update"],
        "federation.rounds": ["Schedule", "federate"],
        "models.catalogue": ["prepare"],
        "plotting": ["film_grid", "save_figure", "show_films", "source_note"],
        "privacy.accounting": ["calibrate_noise_multiplier", "epsilon"],
        "privacy.dpsgd": ["Privacy"],
        "privacy.ledger": ["Ledger"],
        "privacy.rng": ["SecureGenerator"],
        "runtime": ["stored"],
        "session": ["setup"],
        "training": ["Training", "predict"],
        "widgets": ["explore"],
    },
)  # fmt: skip
