"""What a SAS model costs in vLLM: tokens that fit into the same memory, and tokens per second, beside other folders'.

python benchmarks/vllm_serving.py SOURCE SAS SAS:base --out serving.json
    FOLDER, or FOLDER:base (that folder with `simulation_cache="base"`); texts are compared with the first's

The engines run one at a time, each in a process of its own, in turns (`--rounds`), so that what else the machine does
befalls all alike; of the rounds the best is told. On a loaded machine the seconds of the processor say more
(OMP_NUM_THREADS=1). Needs vLLM: `make test-vllm` makes an environment.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def measure(model: str, arguments: argparse.Namespace) -> dict:
    """In this process: the cache's tokens, and seconds of prompts alone and with what is written."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams

    folder, _, form = model.partition(":")
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=arguments.prompt_length + arguments.new_tokens,
        max_num_seqs=arguments.texts,
        max_num_batched_tokens=arguments.texts * arguments.prompt_length,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
        kv_cache_memory_bytes=arguments.cache_mib << 20,
        hf_overrides={"simulation_cache": form} if form else {},
    )
    texts = [[1000 + 97 * i + j for j in range(arguments.prompt_length)] for i in range(arguments.texts)]

    def seconds(new: int) -> tuple[dict, list]:
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in texts], greedy, use_tqdm=False)
        spent = {"second": time.perf_counter() - wall, "cpu_second": time.process_time() - cpu}
        return spent, [list(output.outputs[0].token_ids) for output in outputs]

    seconds(2)  # warm
    (prompt, _), (whole, tokens) = seconds(1), seconds(arguments.new_tokens)
    cache = engine.llm_engine.vllm_config.cache_config
    found = {"cache_tokens": cache.num_gpu_blocks * cache.block_size, "tokens": tokens}
    for unit in prompt:
        found[f"prompt_tokens_per_{unit}"] = arguments.texts * arguments.prompt_length / prompt[unit]
        found[f"new_tokens_per_{unit}"] = arguments.texts * (arguments.new_tokens - 1) / (whole[unit] - prompt[unit])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-mib", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, default=Path("vllm-serving.json"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.child.write_text(json.dumps(measure(arguments.models[0], arguments)))
        return

    rounds = {model: [] for model in arguments.models}
    child = arguments.out.with_suffix(".child")
    for _ in range(arguments.rounds):
        for model in arguments.models:
            subprocess.run([sys.executable, *without_models(arguments, model), "--child", str(child)], check=True)
            rounds[model].append(json.loads(child.read_text()))
    child.unlink()

    first, rows = rounds[arguments.models[0]], {}
    print(
        f"| model | tokens in {arguments.cache_mib} MiB | new tokens/s | prompt and new tokens/CPU s | equal texts |"
    )
    print("|---|---|---|---|---|")
    for model, found in rounds.items():
        row = {name: max(one[name] for one in found) for name in found[0] if name != "tokens"}
        row["equal_texts"] = sum(a == b for a, b in zip(found[0]["tokens"], first[0]["tokens"], strict=True))
        row["bytes_per_token"] = (arguments.cache_mib << 20) / row["cache_tokens"]
        rows[model] = row | {"rounds": [{k: v for k, v in one.items() if k != "tokens"} for one in found]}
        print(
            f"| {model} | {row['cache_tokens']:,} | {row['new_tokens_per_second']:.1f} | "
            f"{row['prompt_tokens_per_cpu_second']:.0f} and {row['new_tokens_per_cpu_second']:.1f} | "
            f"{row['equal_texts']} of {arguments.texts} |"
        )
    arguments.out.write_text(
        json.dumps({"arguments": vars(arguments) | {"out": str(arguments.out)}, "models": rows}, indent=2)
    )


def without_models(arguments: argparse.Namespace, model: str) -> list[str]:
    """The command line of one model's process."""
    options = [
        "--texts",
        arguments.texts,
        "--prompt-length",
        arguments.prompt_length,
        "--new-tokens",
        arguments.new_tokens,
    ]
    options += ["--dtype", arguments.dtype, "--cache-mib", arguments.cache_mib, *["--eager"] * arguments.eager]
    return [__file__, model, *map(str, options)]


if __name__ == "__main__":
    main()
