"""How good is a frozen backbone? Probes on its features: kNN, a linear classifier, and one from a few labels.

`Evaluator` does all of it; the other modules are one probe each, pure functions of features and labels.
"""

from fedssl.evaluate.evaluator import Evaluation, Evaluator
from fedssl.evaluate.features import extract_features, standardise
from fedssl.evaluate.few_labels import FewLabels
from fedssl.evaluate.knn import KNN
from fedssl.evaluate.linear import LinearProbe
from fedssl.evaluate.logistic import LinearClassifier, LogisticRegression, PrincipalAxes

__all__ = [
    "KNN",
    "Evaluation",
    "Evaluator",
    "FewLabels",
    "LinearClassifier",
    "LinearProbe",
    "LogisticRegression",
    "PrincipalAxes",
    "extract_features",
    "standardise",
]
