import collections
import gzip
import math

import numpy as np

from data.baselines import BASELINE, fit_ngram, score_ngram
from data.sources import make_text

TRAIN = "".join(map(make_text, range(40))).encode()
VAL = "".join(map(make_text, range(40, 50))).encode() + b"\xff\x00 never seen"


def slow_probability(counts, context, byte):
  """Witten-Bell by its recursion, on dictionaries; context None is before the first order."""
  if context is None:
    return 1 / 256
  lower = slow_probability(counts, context[1:] if context else None, byte)
  following = counts[context]
  total, types = sum(following.values()), len(following)
  return (following[byte] + types * lower) / (total + types) if total else lower


def test_ngram_is_witten_bell():
  counts = collections.defaultdict(collections.Counter)
  for i in range(len(TRAIN)):
    for n in range(min(i, 4) + 1):
      counts[TRAIN[i - n:i]][TRAIN[i]] += 1
  p = score_ngram(fit_ngram(TRAIN), VAL)
  slow = [slow_probability(counts, VAL[max(0, i - 4):i], VAL[i]) for i in range(len(VAL))]
  np.testing.assert_allclose(p, slow, rtol=1e-10)


def test_ngram_is_a_distribution():
  tables = fit_ngram(TRAIN)
  for context in (b"", b"d", b"def ", b"A story of Ada", b"\xff\xfe\xfd\xfc", b"zq"):
    total = sum(score_ngram(tables, context + bytes([b]))[-1] for b in range(256))
    assert math.isclose(total, 1, rel_tol=1e-12)


def test_bits_per_byte():
  gzip_bits, ngram_bits = BASELINE["gzip"](TRAIN, VAL), BASELINE["ngram5"](TRAIN, VAL)
  assert gzip_bits == 8 * len(gzip.compress(VAL, 9)) / len(VAL)
  assert 0 < ngram_bits < gzip_bits < 8  # Made-up text is nearly regular.
  assert BASELINE["ngram5"](b"", VAL) == 8  # Knows nothing.
