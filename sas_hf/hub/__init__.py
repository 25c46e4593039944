"""Cards, export, and looking into a checkpoint before it is loaded."""
