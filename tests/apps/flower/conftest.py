"""Without Flower nothing here is collected: its tests import it."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["test_*.py"]
