"""Calls to the service: the client, one call, how often it is repeated, how many go at once."""
