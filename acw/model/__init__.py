"""The finished model: assembled, saved, loaded, predicting; the DeepGaze IIE checkpoint as one."""
