"""Privacy-preserving medical imaging, end to end, on a laptop. Importing this imports nothing heavy."""

__version__ = "0.1.0"
