"""Batch jobs: their rows, their records, and rounds of them until every row is answered."""
