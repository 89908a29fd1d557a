"""Readable reference quantizers, one short file an algorithm, over NumPy arrays and torch tensors.

Every quantizer has ``name``, ``bits`` and ``reconstruct(x)``: see ``protocol.Quantizer``.
"""

from ggml_tq.reference.protocol import Array, Quantizer

__all__ = ["Array", "Quantizer"]
