"""Other people's formats of responses with log-probabilities, turned into the form that the readers check."""
