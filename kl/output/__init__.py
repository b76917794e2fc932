"""Result files, and the headline for people."""
