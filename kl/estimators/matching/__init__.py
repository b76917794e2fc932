"""How listed tokens of P and Q are found to be one: for many positions at once, and for one by all the rules."""
