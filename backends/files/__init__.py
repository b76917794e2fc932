"""Both sides on disk: Q's lists come from files of the same forms as P's."""
