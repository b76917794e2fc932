"""Two lists of candidates in, bounds and estimates of their divergence out."""
