"""NumPy reference of the cache format: docs/format.md, bit for bit."""
