"""Wire formats of a client's similarity: what an upload holds, what error that adds, what the server refuses.

A codec turns embeddings of the public set into named numpy arrays and those back into a `Similarity` (`sharpened`: into
`AnchorMass`). It states `bound`, the largest error it may add to an entry of S, from which the server's tolerances
are derived, and `target_bound`, what that does to a target. Encoding and decoding go row block by row block.

The server decodes what anybody may have sent, so `decode` trusts nothing: whatever the arrays hold, it returns a
similarity whose entries lie in [-1, 1] with ones on the diagonal, or raises `PayloadError` with the reason.
"""

from fedssl.codecs.base import Codec
from fedssl.codecs.dense import Dense
from fedssl.codecs.factor import Factor, random_rotation
from fedssl.codecs.sharpened import Sharpened, num_anchors
from fedssl.codecs.topk import TopK
from fedssl.codecs.triangle import Triangle

__all__ = ["Codec", "Dense", "Factor", "Sharpened", "TopK", "Triangle", "num_anchors", "random_rotation"]
