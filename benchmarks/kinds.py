"""What every attention kind costs, alone and simulated, in one backbone: the table of docs/attention.md.

    python benchmarks/kinds.py --context 1024

Counted, not timed: parameters, cached numbers and floating-point operations of the 125M backbone (12 layers,
C = 768, 12 heads of 64; kernel 1, heads tripled, features half as many again). Nothing is allocated.
"""

import argparse

from rich.console import Console
from rich.table import Table

from sas_hf.configurations import named_config
from sas_hf.info import describe


KINDS = {
    "mha": {},
    "gqa": {"attention_type": "gqa", "num_key_value_heads": 4},
    "mqa": {"attention_type": "mqa"},
    "mla": {"attention_type": "mla"},
    "tpa": {"attention_type": "tpa"},
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
    "super": {"attention_type": "super"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, default=1024)
    context = parser.parse_args().context
    table = Table(title=f"12 layers, C = 768, 12 heads; operations at context {context:,}")
    columns = ("kind", "attention of a layer", "simulation", "cached/token: state", "expanded", "MFLOPs/token")
    for column in columns:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, fields in KINDS.items():
        for simulated in (False, True):
            if kind == "super" and simulated:
                continue
            config = named_config("mha-125m", **fields)
            if simulated:
                width = config.query_head_dim * 3 // 2
                sizes = {"num_simulated_heads": 36, "simulated_head_dim": width, "simulation_cache": "base"}
                config = named_config("mha-125m", **fields, **sizes)
            costs = describe(config, context)
            expanded = "-"
            if simulated:
                config.simulation_cache = "expanded"
                expanded = f"{describe(config, context).cache_numbers:,}"
            table.add_row(
                kind + (" + SAS" if simulated else ""),
                f"{costs.attention_parameters // 12:,}",
                f"{costs.simulation_parameters // 12:,}" if simulated else "-",
                f"{costs.cache_numbers:,}",
                expanded,
                f"{costs.forward_flops / 1e6:,.1f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
