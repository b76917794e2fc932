"""What batch jobs left in the bucket, and what may go."""
