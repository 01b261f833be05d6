"""How good is a backbone? Probes on its features, fine-tuning, and diagnostics without a classifier.

`Evaluator` does what a run's rounds are probed with: kNN, a linear classifier, and one from a few labels. `Examiner`
does the rest, once, when a run is over. The other modules are one measure each, pure functions of features and labels.
"""

from fedssl.evaluate.diagnostics import Diagnostics, linear_cka
from fedssl.evaluate.evaluator import Evaluation, Evaluator
from fedssl.evaluate.features import extract_features, standardise
from fedssl.evaluate.few_labels import FewLabels, LabelShares
from fedssl.evaluate.finetune import FineTuning
from fedssl.evaluate.knn import KNN
from fedssl.evaluate.linear import LinearProbe
from fedssl.evaluate.logistic import LinearClassifier, LogisticRegression, PrincipalAxes
from fedssl.evaluate.plane import Plane, principal_plane
from fedssl.evaluate.thorough import Examiner, Findings, Thorough

__all__ = [
    "KNN",
    "Diagnostics",
    "Evaluation",
    "Evaluator",
    "Examiner",
    "FewLabels",
    "Findings",
    "FineTuning",
    "LabelShares",
    "LinearClassifier",
    "LinearProbe",
    "LogisticRegression",
    "Plane",
    "PrincipalAxes",
    "Thorough",
    "extract_features",
    "linear_cka",
    "principal_plane",
    "standardise",
]
