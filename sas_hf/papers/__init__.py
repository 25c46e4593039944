"""Every table and figure of both papers: declarations that one command runs, at a size for a CPU and the paper's."""
