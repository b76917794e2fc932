"""Where log-probabilities come from: one module per backend, found through pluggy."""
