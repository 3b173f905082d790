"""Faces of people who do not exist, known as numbers: what is needed daily, from the modules that the notebooks export."""
from .expression import Expression, Manner
from .identity import Identity, population
from .pack import make, truth
from .rendering import Camera, landmarks, masks, render
