"""Calibration: from a dense model and some text to the pattern that loses least at a budget."""
