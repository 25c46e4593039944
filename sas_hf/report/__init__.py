"""Tables, figures and files out."""
