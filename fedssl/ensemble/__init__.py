"""From the clients' similarities to one target per public image, block by block.

For a batch of public images i and the anchors j in the queue, a rule turns each client's cosines S_k[i, j] into one
matrix p[i, j] whose rows sum to 1 (or, for `cka_kernel`, into a kernel). An n x n matrix never exists. One rule, one
formula: `means` (who counts how much), `robust` (whom to believe); `target` is what a student sees of them.
"""

from fedssl.ensemble.base import Block, Rule, Summable, check_temperature
from fedssl.ensemble.coordinates import mean_kernel_factors, principal_coordinates
from fedssl.ensemble.means import (
    AttentionMean,
    CertaintyMean,
    EntropyMatchedMean,
    MeanKernel,
    RowMean,
    SharpenedMean,
    SizeMean,
    WholeRowMean,
)
from fedssl.ensemble.robust import AgreementMean, Krum, Median, TrimmedMean
from fedssl.ensemble.target import EnsembleTarget, MassTarget, Target, check_cohort, check_summable, make_target

__all__ = [
    "AgreementMean",
    "AttentionMean",
    "Block",
    "CertaintyMean",
    "EnsembleTarget",
    "EntropyMatchedMean",
    "Krum",
    "MassTarget",
    "MeanKernel",
    "Median",
    "RowMean",
    "Rule",
    "SharpenedMean",
    "SizeMean",
    "Summable",
    "Target",
    "TrimmedMean",
    "WholeRowMean",
    "check_cohort",
    "check_summable",
    "check_temperature",
    "make_target",
    "mean_kernel_factors",
    "principal_coordinates",
]
