"""Layers of experts, of which a router chooses a few for each token (mixture of experts).

reference.py has their meaning in array code, plans.py what kernels/experts/ are launched with, on_card.py the layer by
these kernels. Back ends call them in one place each: `experts` of ops/reference.py and of ops/cuda.py.
"""
