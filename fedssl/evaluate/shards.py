"""Each client on its own distribution: the test images reweighted to the classes that a client has.

There is no test split of a client's own. So the test images of class c get the weight p_c / n_c, with p_c the client's
share of that class in training and n_c its test images: the weighted accuracy is what test images drawn like the
client's would give, on average, and it uses every test image of the client's classes. The classifiers remain those
that all labels have trained, and may answer with any class: what varies over clients is the mix of classes alone.
"""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


def accuracy_on(correct: Bool[Tensor, " t"], labels: Int64[Tensor, " t"], counts: Int64[Tensor, " c"]) -> float:
    """sum_c p_c a_c, with a_c the accuracy on test images of class c and p_c the client's share of it.

    Classes without a test image are left out of the shares; NaN if the client has no other.

    Args:
        correct: whether each test image was classified right.
        labels: the test images' classes, 0..c-1.
        counts: the client's images of each class.
    """
    sizes = labels.bincount(minlength=len(counts))
    right = labels[correct].bincount(minlength=len(counts))
    shares = torch.where(sizes > 0, counts.to(labels.device), 0).double()
    return (shares / shares.sum() * right / sizes.clamp_min(1)).sum().item()
