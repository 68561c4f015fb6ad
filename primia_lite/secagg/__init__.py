"""Secure aggregation: the server learns the sum of the hospitals' updates and no single one.

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017), figure 4, with the
neighbours of Bell et al. (CCS 2020) where hospitals are many. A round has five exchanges:

1. ``advertise``: each hospital makes two X25519 keys for this round alone.
2. ``share``: it draws the seed of a mask of its own and splits that seed, and its key for masks, among its neighbours
   (Shamir), each share encrypted for its receiver.
3. ``mask``: it computes its update, in integers modulo 2^32, and adds its own mask and one for each neighbour; the
   latter cancel in the sum.
4. ``confirm``: it signs the list of those whose masked updates arrived, and the keys of this round.
5. ``unmask``: given signatures of at least the threshold under one list, it hands out shares: for a hospital on the
   list of its own mask's seed, for one that vanished of its key, never both.

All that a hospital sends is signed by its Ed25519 identity, which the others have pinned in the :class:`Agreement`.

What holds: a server that follows the protocol, and up to ``threshold - 1`` hospitals that tell it all they know, learn
the sum of the others' updates and nothing else. So does a server that lies, if fewer than ``2 threshold - n`` hospitals
work with it: two lists of survivors can't both get enough signatures. Where hospitals have neighbours (above 100), a
tenth of them may work with the server, but for 2^-40 over 2^40 graphs that it tries; one that follows the protocol
learns the sum of the others, one that lies may split it into sums of groups, and gets no single update.

One round, one answer. Two sums of the same updates with different survivors give their difference away. So where no
noise protects an update, a hospital is told which :class:`Question` it answers. The question goes into the masks:
updates of other rounds, or from other weights, don't cancel. And a hospital signs one list of survivors for a round of
a study, and one set of weights, whatever the session, and remembers it for good (see :meth:`SecAggClient.save`).
What was signed may be asked for again, and gives the same sum. A round that ended before ``confirm`` may be asked again
with anybody; one that ended later only with the hospitals that were on the list: others may have opened that sum, and
nobody can tell. If these don't come back, take another study. With DP no such memory is kept: each answer is charged to
a ledger, or is a noisy update that was charged and is sent again.

What doesn't hold: with two survivors each learns the other's update, from the sum; a hospital that lies about its
update within the clip isn't noticed; nor is anybody kept from spoiling a round, or a server from giving the same
weights out in a later round of the study, with other hospitals, and subtracting: it gets as many sums as rounds were
agreed on. What sums tell of their parts is a matter for DP.

The server's code never holds an unmasked update: masked ones are added up as they come.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["agreement", "client", "keys", "messages", "server", "shares"],
    submod_attrs={
        "agreement": ["Agreement", "ProtocolError", "Question", "TooFewSurvivors"],
        "client": ["SecAggClient"],
        "fixed_point": ["FixedPoint", "centred", "integers"],
        "graph": ["choose_degree", "default_threshold"],
        "keys": ["derive", "mask_seed", "mask_sign"],
        "masks": ["add_masks"],
        "messages": ["Reply", "STEPS", "request"],
        "server": ["SecAggServer", "run_round"],
    },
)
