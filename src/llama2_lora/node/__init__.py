"""What a node says of itself, and what is judged of it."""
