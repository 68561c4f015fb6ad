"""The server's side of shared noise: from the sum of the hospitals' whole numbers to a step.

Nothing here sees a single hospital's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from primia_lite.config import UserError
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.training import Training


def shared_step(
    total: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    training: Training,
    privacy: Privacy,
    declared: int,
) -> dict[str, torch.Tensor]:
    """How the global weights change: -η (total / (s q declared) + λ weights).

    It equals the mean of the steps that the hospitals would take alone, weighted by their declared units.

    Parameters
    ----------
    total : the sum of the hospitals' ``Update.delta``, int64 by parameter name, negative numbers as such
    state : the global weights; weight decay λ applies to those in ``total``
    declared : the declared units of the hospitals in the sum, together
    """
    if not privacy.shared:
        raise UserError("this privacy has no shared noise: give Privacy(..., shared=SharedNoise(...))")
    sizes = sorted(privacy.shared.declared)
    least = sum(sizes[: privacy.shared.threshold])
    if not least <= declared <= sum(sizes):
        raise UserError(
            f"declared is {declared}: {privacy.shared.threshold} to {len(sizes)} of the hospitals that agreed on "
            f"shared noise declare {least} to {sum(sizes)} units together; add up those of the hospitals in the sum"
        )
    privacy.quantizer.check_parameters(sum(value.numel() for value in total.values()))
    for name, value in total.items():
        if value.dtype != torch.int64 or name not in state or value.shape != state[name].shape:
            raise UserError(
                f"the sum of {name!r} is {value.dtype} {tuple(value.shape)}: give int64 in the shape of the global "
                "weights"
            )
    divisor = privacy.quantizer.scale * training.sample_rate * declared
    return {
        name: (-training.learning_rate * (value.double() / divisor + training.weight_decay * state[name].double())).to(
            state[name].dtype
        )
        for name, value in total.items()
    }
