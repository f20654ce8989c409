"""Does a norm on queries and keys hold a rate that is too high without it?

RMSNorm of each head's queries and keys (arXiv:2302.05442; arXiv:2309.14322: small models at high rates show
what large ones do), against none, at a rate that is far too high for this model, and at a tenth of that.
"""
import itertools

BASE = "configs/small.py"
BASELINE = "qk_norm=None,lr=0.06"
SEEDS = range(3)


def runs():
  for lr, norm in itertools.product((6e-2, 6e-3), (None, "rmsnorm")):
    yield {"model.qk_norm": norm, "optim.lr": lr}
