"""Sampling: which prompts, what is there already, asking the models, files of responses."""
