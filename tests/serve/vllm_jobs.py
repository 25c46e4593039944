"""Runs models in vLLM, one after the other, in a process of its own: `python vllm_jobs.py JOBS.json RESULTS.jsonl`.

vLLM changes the classes of the models that it serves, so that the process that compares must not be this one. A job
is a dictionary of the arguments of `LLM`, of "prompts" (for each call a list of lists of token ids) and of "task":
"generate", "embed", "classify", "pairs" (classified; the first three tokens are one text, the others another) or
"start". Its result has the answers of each call, or the error's message.
"""

import gc
import json
import os
import sys


os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
DEFAULTS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "kv_cache_memory_bytes": 64 << 20,
}


def run(task: str, prompts: list, max_tokens: int = 12, prompt_scores: bool = True, **arguments) -> dict:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(**DEFAULTS | arguments)
        calls = [[{"prompt_token_ids": ids} for ids in call] for call in prompts]
        answers = [answer(llm, task, call, max_tokens, prompt_scores) for call in calls]
        cache = llm.llm_engine.vllm_config.cache_config
        return {"answers": answers, "tokens_of_cache": (cache.num_gpu_blocks or 0) * cache.block_size}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answer(llm, task: str, prompts: list, max_tokens: int, prompt_scores: bool) -> list:
    from vllm import PoolingParams, SamplingParams

    if task == "embed":
        return [list(output.outputs.embedding) for output in llm.embed(prompts, use_tqdm=False)]
    if task == "classify":
        return [list(output.outputs.probs) for output in llm.classify(prompts, use_tqdm=False)]
    if task == "pairs":
        params = PoolingParams(task="classify", extra_kwargs={"compressed_token_type_ids": 3})
        return [list(output.outputs.probs) for output in llm.classify(prompts, pooling_params=params, use_tqdm=False)]
    if task == "start":
        return []
    greedy = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=0,
        prompt_logprobs=0 if prompt_scores else None,
        ignore_eos=True,
        detokenize=False,
    )
    found = []
    for output in llm.generate(prompts, greedy, use_tqdm=False):
        new = list(output.outputs[0].token_ids)
        rows, tokens = list(output.outputs[0].logprobs), new
        if prompt_scores:
            rows, tokens = [*output.prompt_logprobs[1:], *rows], [*output.prompt_token_ids[1:], *new]
        scores = [row[token].logprob for row, token in zip(rows, tokens, strict=True)]
        found.append({"tokens": new, "scores": scores, "cached": output.num_cached_tokens})
    return found


if __name__ == "__main__":
    jobs, results = sys.argv[1:]
    with open(jobs) as file, open(results, "w") as out:
        for job in json.load(file):
            print(json.dumps(run(**job)), file=out, flush=True)
