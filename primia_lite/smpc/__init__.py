"""Function secret sharing between two servers: a deep network reads a film that neither of them can see.

:func:`compile` makes of a network a public :class:`Program` and weights, which its owner sends in shares
(:func:`send_model`). A dealer makes keys (:func:`deal`), each good for one diagnosis. Two servers (:class:`Server`)
compute. :func:`diagnose` is what the owner of a film calls. :func:`simulate` has it all in one process.
"""

from primia_lite.smpc.client import diagnose, send_model
from primia_lite.smpc.compiler import compile
from primia_lite.smpc.connection import Party, PeerError, make_identity
from primia_lite.smpc.keys import deal
from primia_lite.smpc.program import Program
from primia_lite.smpc.server import Server
from primia_lite.smpc.simulation import simulate, simulate_film

__all__ = [
    "Party", "PeerError", "Program", "Server", "compile", "deal", "diagnose", "make_identity",
    "send_model", "simulate", "simulate_film",
]  # fmt: skip
