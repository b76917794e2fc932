"""What was bought: scores by prompt and key, a journal of what arrives, the service's own rows."""
