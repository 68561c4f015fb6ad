"""The phantom: procedural chest films as plain arrays. Nothing of the rest of the package is known here.

anatomy: what differs between patients, poses and classes; canvas: smooth things on a grid; render: attenuation maps;
films: from a map to a film.
"""

from primia_lite.phantom.films import CLASS_FRACTIONS, CLASS_NAMES, draw

__all__ = ["CLASS_FRACTIONS", "CLASS_NAMES", "draw"]
