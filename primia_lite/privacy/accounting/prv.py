"""Privacy random variables of the subsampled Gaussian, in the direction of removal (Gopi, Lee, Wutschitz 2021)."""

from __future__ import annotations

import warnings

import numpy as np

from primia_lite.config import UserError
from primia_lite.privacy.accounting import pld
from primia_lite.privacy.accounting.releases import Release

_ARRAYS = 12  # as long as the grid, held at once


def bounds(releases: tuple[Release, ...], delta: float, about: float) -> tuple[float, ...]:
    """ε by Opacus, from below, estimated, from above; ``about`` is near it.

    Raises
    ------
    UserError
        Losses above 690, a grid above 1 GiB, or a δ that is lost in rounding: there it is no bound.
    """
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sample_rate, r.steps) for r in releases]
    error = {"eps_error": 1e-3 * max(about, 1e-2), "delta_error": delta / 1000}
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(1 - q) at q = 1, and a note on RDP's orders
        warnings.simplefilter("ignore")
        try:
            prvs = [PoissonSubsampledGaussianPRV(r.sample_rate, r.noise_multiplier) for r in releases]
            domain = accountant._get_domain(prvs=prvs, num_self_compositions=[r.steps for r in releases], **error)
            gib = 8 * domain.size * (len(releases) + _ARRAYS) / 2**30
            if domain.t_max > 690:
                raise ValueError(f"privacy losses reach {domain.t_max:.4g}, and beyond 690 e^loss overflows")
            if gib > 1:
                raise ValueError(f"its grid would take {gib:.1f} GiB of memory")
            if delta / 1000 < pld.rounding(releases):
                raise ValueError(f"a delta of {delta:g} is lost in rounding")
            found = accountant._get_dprv(**error).compute_epsilon(delta, **error)
            if not np.isfinite(found).all():
                raise ValueError("its sums overflow")
        except (ValueError, ArithmeticError, RuntimeError) as reason:
            raise UserError(f"PRV gives no bound at delta {delta:g} ({reason}): use pld or rdp") from reason
    return tuple(max(0.0, float(e)) for e in found)
