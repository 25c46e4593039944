"""A small result of an item, for tests of what is made of results."""

from sas_hf.papers.comparison import Comparison, ItemResult, comparison_grid, environment


def comparison(ours, printed, low=None, high=None, **fields):
    return Comparison("sas minus mha, perplexity", "nats", ours, printed, low, high, **fields)


def result(**fields):
    comparisons = [comparison(-0.03, -0.05, -0.04, -0.02, n=5), comparison(4, 5, neutral=None)]
    return ItemResult(
        **{
            "paper": "sas",
            "item": "table7",
            "size": "cpu",
            "title": "Every method under simulation",
            "stand_in": "technical text for Books3",
            "command": "sas-hf paper sas table7",
            "seconds": 3700.0,
            "environment": environment(),
            "grids": [comparison_grid("Beside the paper", comparisons)],
            "comparisons": comparisons,
            "numbers": {"a": [1.0]},
            "notes": ["Small."],
        }
        | fields
    )
