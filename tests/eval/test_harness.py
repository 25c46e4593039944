"""The model type: the harness's own numbers, whatever the batches, and batches that keep within memory."""

import copy

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.eval import SASHFLM, evaluate
from sas_hf.eval.harness import CPU_BATCH_BYTES, bytes_per_sequence, default_budget
from sas_hf.eval.task_loading import SHIPPED_TASKS, task_manager


@pytest.fixture
def requests(text):
    sentences = text.splitlines()
    pairs = [(" ".join(sentences[i : i + 1 + i % 4]), " " + sentences[100 + i]) for i in range(40)]
    return [Instance("loglikelihood", {}, pair, 0, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]


def score(model, requests):
    return torch.tensor([value for value, _ in model.loglikelihood(requests, disable_tqdm=True)])


def test_registered_under_its_name():
    assert get_model("sas_hf") is SASHFLM


@pytest.mark.parametrize("task", ["arc_easy", "sas_continuation"])
def test_equals_the_harness_s_own_model(task, checkpoint, data):
    folder = {"arc_easy": "allenai/ai2_arc/ARC-Easy", "sas_continuation": "sas_hf/continuation/default"}[task]
    # The form in which the harness itself lets a stock task read another source.
    source = {
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data / folder / "validation.parquet")}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    for num_fewshot in (0, 2):
        expected = simple_evaluate(
            HFLM(str(checkpoint), device="cpu"),
            tasks=[{"group": "local", "task": [source]}],
            num_fewshot=num_fewshot,
            task_manager=task_manager(),
        )
        result = evaluate(
            checkpoint,
            task,
            data=data,
            num_fewshot=num_fewshot,
            batch_size=1,
            truncation=True,
            device="cpu",
            log_samples=True,
        )
        assert (result.num_truncated > 0) == (num_fewshot > 0 and task == "sas_continuation")

        assert [sample["responses"] for sample in result.tasks[task].samples] == [
            [responses[0] for responses in sample["resps"]] for sample in expected["samples"][task]
        ]
        for metric in ("acc", "acc_norm"):
            assert result.tasks[task].metrics[metric].value == expected["results"][task][f"{metric},none"]
            assert result.tasks[task].metrics[metric].stderr == expected["results"][task][f"{metric}_stderr,none"]


def test_log_likelihoods_do_not_depend_on_the_batches(checkpoint, requests):
    one_by_one = score(SASHFLM(str(checkpoint), batch_size=1, device="cpu"), requests)
    assert one_by_one.std() > 1
    by_seven = score(SASHFLM(str(checkpoint), batch_size=7, device="cpu"), requests)
    automatic = SASHFLM(str(checkpoint), memory_budget=6_000_000, device="cpu")
    torch.testing.assert_close(by_seven, one_by_one, atol=1e-4, rtol=0)
    torch.testing.assert_close(score(automatic, requests), one_by_one, atol=1e-4, rtol=0)
    assert len(set(automatic.chosen_batch_sizes)) > 2


@pytest.mark.parametrize("budget", [1, 3_000_000, 6_000_000, 1 << 40])
def test_automatic_batches_keep_within_the_budget(budget, checkpoint, requests, monkeypatch):
    model = SASHFLM(str(checkpoint), memory_budget=budget, device="cpu")
    shapes = []
    call = model._model_call
    monkeypatch.setattr(model, "_model_call", lambda inputs: shapes.append(tuple(inputs.shape)) or call(inputs))
    model.loglikelihood(requests, disable_tqdm=True)

    assert sum(rows for rows, _ in shapes) == len(requests)
    assert [rows for rows, _ in shapes] == model.chosen_batch_sizes
    for rows, length in shapes:
        assert rows == 1 or rows * bytes_per_sequence(model.config, length) <= budget
    if budget == 1:
        assert {rows for rows, _ in shapes} == {1}
    elif budget == 1 << 40:
        assert shapes[0][0] == len(requests)
    else:  # not one more would have fitted; shorter requests come in larger batches
        rows, length = shapes[0]
        assert (rows + 1) * bytes_per_sequence(model.config, length) > budget
        assert shapes[-2][0] > rows


def test_batches_have_a_budget_where_free_memory_is_not_known():
    assert default_budget(torch.device("mps")) == CPU_BATCH_BYTES * torch.get_num_threads()


def test_automatic_is_the_default_and_takes_several(checkpoint, requests):
    model = SASHFLM(str(checkpoint), device="cpu")
    model.loglikelihood(requests, disable_tqdm=True)
    assert min(model.chosen_batch_sizes) > 1


def test_no_batch_exceeds_the_maximum(checkpoint, requests):
    model = SASHFLM(str(checkpoint), max_batch_size=6, device="cpu")
    model.loglikelihood(requests, disable_tqdm=True)
    assert model.chosen_batch_sizes == [6] * 6 + [4]


def test_rolling_log_likelihood_with_automatic_batches(checkpoint, text):
    requests = [Instance("loglikelihood_rolling", {}, (text[:4000],), 0, metadata=("task", 0, 1))]
    (expected,) = HFLM(str(checkpoint), device="cpu").loglikelihood_rolling(requests, disable_tqdm=True)
    automatic = SASHFLM(str(checkpoint), device="cpu")
    (value,) = automatic.loglikelihood_rolling(requests, disable_tqdm=True)
    assert value == pytest.approx(expected, abs=1e-2)
    assert automatic.chosen_batch_sizes


def test_more_logits_or_simulation_need_more_memory(config):
    def need(length, **changes):
        return bytes_per_sequence(SASGPTConfig(**config.to_diff_dict() | changes), length)

    assert need(100) >= 3 * 4 * 100 * config.vocab_size
    assert need(100, vocab_size=50_000) > 40 * need(100)
    assert need(100, num_simulated_heads=8) > need(100)
    assert need(200) > 2 * need(100)


def test_refuses_a_bidirectional_model(config, tmp_path):
    bidirectional = SASGPTConfig(**config.to_diff_dict() | {"is_causal": False})
    with pytest.raises(ValueError, match=r"is_causal=False.*causal decoder"):
        SASHFLM(SASGPTForCausalLM(bidirectional))
    bidirectional.save_pretrained(tmp_path)  # no weights: the configuration is enough to refuse it
    assert not AutoConfig.from_pretrained(tmp_path).is_causal
    with pytest.raises(ValueError, match="is_causal=False"):
        SASHFLM(str(tmp_path), device="cpu")


def test_refuses_an_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="is_encoder_decoder=True"):
        SASHFLM(model)


def test_the_shipped_task_is_in_its_folder():
    assert task_manager().task_index["sas_continuation"].yaml_path.parent == SHIPPED_TASKS


def with_template(tokenizer, single):
    """The tokenizer, putting its end token where `single` says: before a text, behind it, or both."""
    changed = copy.deepcopy(tokenizer)
    token = (tokenizer.eos_token, tokenizer.eos_token_id)
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[token])
    changed.bos_token = tokenizer.eos_token
    return changed


def request(kind, *args):
    return Instance(kind, {}, args, 0, metadata=("task", 0, 1))


def plain_score(model, context, continuation):
    """Log-likelihood of tokens given others, by the definition."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(logits[place, token].item() for place, token in zip(places, continuation, strict=True))


@pytest.mark.parametrize("single", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|>", "$A <|endoftext|>"])
def test_what_a_tokenizer_puts_around_a_text_stands_there_once(single, model, tokenizer):
    """The harness's `hf` has bos twice before a whole text, and lets a context end before its continuation."""
    own = with_template(tokenizer, single)
    scorer = SASHFLM(model, tokenizer=own, batch_size=1)
    plain, start = tokenizer.encode("Some words of a text."), [tokenizer.eos_token_id]
    (whole,) = scorer.loglikelihood_rolling([request("loglikelihood_rolling", "Some words of a text.")], True)
    assert whole == pytest.approx(plain_score(model, start, plain), abs=1e-4)
    ((value, _),) = scorer.loglikelihood([request("loglikelihood", "Some words", " of a text.")], True)
    context = (start if single.startswith("<") else []) + tokenizer.encode("Some words")
    assert value == pytest.approx(plain_score(model, context, tokenizer.encode(" of a text.")), abs=1e-4)
    tokens, mask = scorer.tok_batch_encode(["Some words", "Some"])
    assert tokens[0].tolist() == context and mask[1].sum() < mask[0].sum()


def test_bos_is_where_it_was_asked_for(model, tokenizer, data):
    own = with_template(tokenizer, "$A")
    for wanted, start in ((True, [0]), (None, []), (False, [])):
        scorer = SASHFLM(model, tokenizer=own, add_bos_token=wanted)
        assert scorer.tok_encode("a") == start + tokenizer.encode("a")
    with pytest.raises(ValueError, match="`add_bos_token` is True, but the tokenizer has no `bos_token`"):
        evaluate(model, "arc_easy", data=data, tokenizer=tokenizer, add_bos_token=True)


def test_continuations_without_tokens_are_refused(model, tokenizer):
    scorer = SASHFLM(model, tokenizer=tokenizer)
    word = next(word for word in tokenizer.get_vocab() if len(word) == 3 and word.isascii() and word.isalpha())
    assert len(tokenizer.encode(word)) == 1
    with pytest.raises(ValueError, match=f"The continuation '{word[1:]}' after '{word[0]}' has no token of its own"):
        scorer.loglikelihood([request("loglikelihood", word[:1], word[1:])], True)
    for context in ("a", ""):
        with pytest.raises(ValueError, match="continuation of a request of task 'task' is empty"):
            scorer.loglikelihood([request("loglikelihood", context, "")], True)
    # A context of white space alone is one without tokens.
    ((value, _),) = scorer.loglikelihood([request("loglikelihood", "  ", "a b")], True)
    assert value == pytest.approx(plain_score(model, [0], tokenizer.encode("  a b")), abs=1e-4)


def test_log_likelihoods_and_logits_that_are_no_numbers(model, tokenizer):
    scorer = SASHFLM(model, tokenizer=tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for kind, args in (
        ("loglikelihood", ("a", " b")),
        ("loglikelihood_rolling", ("a b",)),
        ("generate_until", ("a", {"until": [], "max_gen_toks": 4})),
    ):
        with pytest.raises(ValueError, match="are not numbers"):
            getattr(scorer, kind)([request(kind, *args)], True)


def test_prompts_longer_than_the_context(config, tokenizer):
    torch.manual_seed(0)
    short = SASGPTForCausalLM(SASGPTConfig(**config.to_diff_dict() | {"max_position_embeddings": 32})).eval()
    prompt, options = "word after word " * 20, {"until": [], "max_gen_toks": 6}
    with pytest.raises(
        ValueError, match=r"A prompt of task 'task' \('word after.*\.\.\.\) has \d+ tokens.*truncation=True"
    ):
        SASHFLM(short, tokenizer=tokenizer).generate_until([request("generate_until", prompt, options)], True)
    with pytest.raises(ValueError, match="generates up to 32 tokens .`max_gen_toks`., which leaves no room"):
        endless = options | {"max_gen_toks": 32}
        SASHFLM(short, tokenizer=tokenizer).generate_until([request("generate_until", "a", endless)], True)
    own = copy.deepcopy(tokenizer)
    own.model_max_length = 20  # from which the tokenizer itself would cut what comes last
    cut = SASHFLM(short, tokenizer=own, truncation=True)
    (made,) = cut.generate_until([request("generate_until", prompt, options)], True)
    tokens = torch.tensor([tokenizer.encode(prompt)[-26:]])
    expected = short.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert made == tokenizer.decode(expected[0, 26:], skip_special_tokens=True) and cut.num_truncated == 1


def test_a_text_generated_does_not_depend_on_its_batch(model, tokenizer):
    """The model's own generation ends nowhere, so that a text goes on after its end until the longest has ended."""
    model.generation_config.eos_token_id = None
    prompts = [f"Prompt number {number}" for number in range(12)]
    requests = [request("generate_until", prompt, {"until": [], "max_gen_toks": 24}) for prompt in prompts]
    with torch.no_grad():  # some end early
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(384))
        model.lm_head.bias[0] = 2.5
    alone, together = (
        SASHFLM(model, tokenizer=tokenizer, batch_size=size).generate_until(requests, True) for size in (1, 12)
    )
    assert alone == together and len({len(made) for made in alone}) > 2


def test_devices_by_their_names(checkpoint):
    assert SASHFLM(str(checkpoint), device="cpu:0").device.type == "cpu"
    for name in ("meta", "hopper"):
        with pytest.raises(ValueError, match=f"`device` is '{name}'"):
            SASHFLM(str(checkpoint), device=name)
