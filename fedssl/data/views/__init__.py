"""Random views of images, drawn and computed for a whole batch at once, on the device that holds it.

A view is two steps: `draw` takes every random number of a batch from one generator, `apply` is a pure function of
images and draw. `colour.py` is SimCLR's recipe for photographs, `geometric.py` one for digits, `shift.py` changes
hardly anything; `crop.py`, `jitter.py` and `blur.py` are the parts. Pixels stay in 0..255, as floats, until the last
step normalises them.
"""

from fedssl.data.views.base import Normalisation, Views
from fedssl.data.views.colour import ColourDraw, ColourViews
from fedssl.data.views.geometric import GeometricDraw, GeometricViews
from fedssl.data.views.shift import ShiftDraw, ShiftViews

__all__ = [
    "ColourDraw",
    "ColourViews",
    "GeometricDraw",
    "GeometricViews",
    "Normalisation",
    "ShiftDraw",
    "ShiftViews",
    "Views",
]
