"""DeepGaze IIE with adaptive category weighting: predicts, as a probability density, where people look in an image."""

from acw.tracking.load import load

__all__ = ["load"]
