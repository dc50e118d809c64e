"""One model over several cards of a host (tensor parallelism): `engine.load(gpus=N)` and `--gpus N`.

Every card has its share of the heads, of the MLP and of the vocabulary (shares.py), and all run the same operations in
lockstep (backend.py) over arrays of which each card has its own (ranks.py). Two operations are collective: the sum over
cards behind the output and the down projection, and the logits that all cards gather (collectives.py): by kernels that
write into other cards' memory, or by NCCL. On a CPU cards are simulated: N reference back ends, which split and sum.
"""
