"""What bench.py measures with: cases, kernels, whole models, memory, and other people's code beside ours. Not part of
the package."""
