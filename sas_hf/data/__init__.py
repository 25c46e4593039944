"""Texts and images in: files, tables and datasets of them."""
