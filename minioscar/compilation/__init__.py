"""How kernels become machine code: one (cubins.py), and all that a run will launch, before it begins (ahead.py)."""
