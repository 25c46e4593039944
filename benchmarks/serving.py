"""What a SAS model costs in `sas-hf serve`: new tokens per second, beside other folders'.

python benchmarks/serving.py SOURCE SAS SOURCE:continuous SAS:continuous --out serving.json
    FOLDER, or FOLDER:continuous (with `--continuous-batching`); texts are compared with the first's

The servers run one at a time, each in a process of its own, in turns (`--rounds`), so that what else the machine does
befalls all alike; of the rounds the best is told. All texts are asked for at once: without continuous batching the
server writes them one after another. Needs the extra `serve`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


PROMPTS = [
    "Attention is",
    "The capital of France is a city on the river",
    "To boil an egg, first",
    "The three laws of motion were written by",
    "A good friend is somebody who",
    "In the year 1969, people",
    "Water turns into ice when",
    "The best way to learn a language is",
]


def measure(model: str, arguments: argparse.Namespace, log: Path) -> dict:
    """Seconds of one server for all texts, and the texts."""
    import openai

    folder, _, batching = model.partition(":")
    flags = ["--continuous-batching", "--cb-num-blocks", str(arguments.blocks)] if batching else []
    command = [sys.executable, "-m", "sas_hf", "serve", folder, "--port", "0", "--dtype", "float32", *flags]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            while not (found := re.search(r"running on (http://\S+:[1-9]\d*)", log.read_text())):
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.2)
            client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", timeout=3600, max_retries=0)

            def answer(prompt: str, new: int):
                return client.completions.create(model=folder, prompt=prompt, max_tokens=new, temperature=0)

            answer(PROMPTS[0], 2)  # warm
            begun = time.perf_counter()
            with ThreadPoolExecutor(arguments.texts) as clients:
                answers = list(
                    clients.map(answer, PROMPTS[: arguments.texts], [arguments.new_tokens] * arguments.texts)
                )
            seconds = time.perf_counter() - begun
        finally:
            server.terminate()
    written = sum(one.usage.completion_tokens for one in answers)
    return {"new_tokens_per_second": written / seconds, "texts": [one.choices[0].text for one in answers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--texts", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=64, help="of the pool of continuous batching")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    arguments = parser.parse_args()
    for model in arguments.models:
        if model.partition(":")[2] not in ("", "continuous"):
            parser.error(f"{model!r} is neither FOLDER nor FOLDER:continuous")

    rounds = {model: [] for model in arguments.models}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for model in arguments.models:
                rounds[model].append(measure(model, arguments, Path(folder) / "log.txt"))

    first = rounds[arguments.models[0]][0]["texts"]
    print("| model | new tokens/s | texts equal to the first's |\n|---|---|---|")
    for model, found in rounds.items():
        equal = min(sum(a == b for a, b in zip(one["texts"], first, strict=True)) for one in found)
        speed = max(one["new_tokens_per_second"] for one in found)
        print(f"| {model} | {speed:.2f} | {equal} of {arguments.texts} |")
    arguments.out.write_text(json.dumps({"arguments": vars(arguments), "rounds": rounds}, indent=2, default=str))


if __name__ == "__main__":
    main()
