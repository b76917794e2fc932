"""The tables of tokens and responses."""
