"""What attention can do with so many heads: small tasks of known need, plain and simulated attention on each."""
