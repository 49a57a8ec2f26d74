"""Attention over packed segments against attention over each sequence alone, in float64."""
