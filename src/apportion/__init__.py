"""apportion: give every layer of a PyTorch model the bits, rank and sparsity it deserves."""

__version__ = "0.1.0"
