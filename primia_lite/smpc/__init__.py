"""Function secret sharing between two servers: a deep network reads a film that neither of them can see."""
