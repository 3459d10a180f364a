"""Exact theory: minimisers, bounds and laws, in NumPy float64. It knows nothing of the trainers."""
