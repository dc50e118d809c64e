"""minioscar: Llama/Qwen-style models on NumPy or CuPy, with the 2-bit KV cache of OScaR (arXiv 2605.19660)."""

__version__ = "0.1.0"
