"""The stages of a run: read and plan, score, measure, write."""
