"""DeepGaze IIE with adaptive category weighting: predicts, as a probability density, where people look in an image."""
