"""The output folder: names, lock, what is written there and read back."""
