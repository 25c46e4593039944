"""The SAS encoder–decoder: BART, mBART and Marian on the same weights, caches, beams, padding, ties and places."""

import pytest
import torch
from helpers import (
    SEQ2SEQ_BASE,
    SEQ2SEQ_VARIANTS,
    TRANSFORMERS,
    all_tensors,
    assert_identical,
    left_padded,
    returned_cache,
    scramble,
    seq2seq,
    token_ids,
)
from packaging.version import Version
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
)

from sas_hf import SASSeq2SeqConfig, SASSeq2SeqForConditionalGeneration, SASSeq2SeqModel


COMMON = {"vocab_size": 67, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
COMMON |= {"decoder_start_token_id": 2, "attention_dropout": 0.0, "dropout": 0.0}
THEIRS = COMMON | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "init_std": 0.3,
    "forced_eos_token_id": None,
}
OURS = COMMON | {
    "hidden_size": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "num_attention_heads": 4,
    "decoder_attention": {"num_attention_heads": 2},
    "cross_attention": {"num_attention_heads": 2},
    "intermediate_size": 48,
    "decoder_intermediate_size": 40,
    "padding_takes_positions": True,
}
MARIAN = {"scale_embedding": True, "activation_function": "swish"}
OURS_OF_MARIAN = {"scale_embedding": True, "hidden_act": "silu", "embedding_norm": False}
OURS_OF_MARIAN |= {"position_embedding_type": "sinusoidal", "lm_head_bias": True}
TWO = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 43}
MBART = {"norm_position": "pre", "scale_embedding": True, "lm_head_bias": True, "decoder_starts_with_last_label": True}
# Of each: their class, configuration, rows of the table of positions that they skip, and our fields.
FAMILIES = {
    "bart": (BartForConditionalGeneration, BartConfig(**THEIRS), 2, {"lm_head_bias": True}),
    "mbart": (MBartForConditionalGeneration, MBartConfig(**THEIRS, scale_embedding=True), 2, MBART),
    "marian": (MarianMTModel, MarianConfig(**THEIRS | MARIAN), None, OURS_OF_MARIAN),
    "marian_two": (MarianMTModel, MarianConfig(**THEIRS | MARIAN | TWO), None, OURS_OF_MARIAN | TWO),
}
NAMES = {
    "layernorm_embedding": "embeddings.norm",
    "embed_tokens": "embeddings.embed_tokens",
    "embed_positions": "embeddings.embed_positions",
    "coder.layer_norm": "coder.norm",
    "out_proj": "o_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_logits_bias": "lm_head.bias",
}


def theirs_and_ours(family: str):
    """A random model of Transformers in evaluation mode, and a SAS encoder–decoder with its weights."""
    their_class, config, skipped, fields = FAMILIES[family]
    theirs = scramble(their_class(config))
    theirs.final_logits_bias.normal_()
    ours = SASSeq2SeqForConditionalGeneration(SASSeq2SeqConfig(**OURS | fields)).eval()
    weights = {}
    for name, weight in theirs.state_dict().items():
        if "shared" in name or ("embed_positions" in name and skipped is None):
            continue
        weight = weight[skipped:] if "embed_positions" in name else weight
        for their_part, part in NAMES.items():
            name = name.replace(their_part, part)
        weights[name] = weight[0] if name == "lm_head.bias" else weight
    ours.load_state_dict(weights)
    return theirs, ours


def source_and_target(vocab_size: int = 43) -> dict[str, torch.Tensor]:
    """Sources padded on either side, and targets whose ends are ignored."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, :3] = 0
    labels = torch.randint(3, vocab_size, (3, 7))
    labels[1, 5:] = -100
    return {"input_ids": torch.randint(3, vocab_size, (3, 9)), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, implementation):
    """Logits, loss, gradients."""
    theirs, ours = theirs_and_ours(family)
    inputs = source_and_target()
    if family == "mbart":  # which has no use for what is ignored
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 1)
    for model in (theirs, ours):
        model.set_attn_implementation(implementation)
    expected, found = theirs(**inputs), ours(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    expected.loss.backward()
    found.loss.backward()
    grads = [model.get_input_embeddings().weight.grad for model in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    grads = [
        ours.model.decoder.layers[0].encoder_attn.q_proj.weight.grad,
        theirs.model.decoder.layers[0].encoder_attn.q_proj.weight.grad,
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_as_transformers_does(family, options):
    if family == "marian_two" and "num_beams" in options and Version("5.18") > TRANSFORMERS:
        pytest.skip("Before 5.18, beams are searched in the encoder's vocabulary: Marian's too.")
    theirs, ours = theirs_and_ours(family)
    inputs = source_and_target()
    del inputs["labels"]
    expected = theirs.generate(**inputs, max_new_tokens=10, **options)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=10, **options), expected)


CACHED = {name: {} for name in SEQ2SEQ_VARIANTS}
CACHED |= {
    f"{name}, base": {"simulation_cache": "base"}
    for name in ("sas", "sas_rope", "mla_sas", "tpa_sas", "efficient_sas", "places")
}
GENERATIONS = {"greedy": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize("form", CACHED)
@torch.no_grad()
def test_caches_and_padding_change_nothing(form):
    """Of both sides, which are padded on the left: as a row alone and without a cache."""
    model = seq2seq(form.partition(",")[0], **CACHED[form]).double()
    model.generation_config.eos_token_id = None
    size = model.config.decoder_vocab_size
    (ids, mask), (target, target_mask) = left_padded(9, 5), left_padded(4, 2)
    target = target % size
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [
        model.generate(
            ids[row, mask[row].bool()][None],
            decoder_input_ids=target[row, target_mask[row].bool()][None],
            use_cache=False,
            **options,
        )[0, -6:]
        for row in range(2)
    ]
    padded = {"attention_mask": mask, "decoder_input_ids": target, "decoder_attention_mask": target_mask}
    for name, more in GENERATIONS.items():
        found = model.generate(ids, **padded, **options, **more)
        if name == "beams":
            expected = model.generate(ids, **padded, **options, **more, use_cache=False)
            assert torch.equal(found, expected), name
        else:
            assert torch.equal(found[:, -6:], torch.stack(alone)), name


@torch.no_grad()
def test_the_source_is_read_once():
    """What is made of it is cached in full, in the expanded form with all simulated heads."""
    model = seq2seq("sas")
    ids, target = token_ids(2, 9), token_ids(2, 3)
    encoded = model.get_encoder()(ids)
    first = model(encoder_outputs=encoded, decoder_input_ids=target[:, :2], use_cache=True)
    cache = returned_cache(first)
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 12, 9, 12)
    assert cache.self_attention_cache.layers[0].keys.shape == (2, 12, 2, 12)
    encoded.last_hidden_state.fill_(torch.nan)
    second = model(encoder_outputs=encoded, decoder_input_ids=target[:, 2:], cache=cache)
    expected = model(ids, decoder_input_ids=target).logits
    torch.testing.assert_close(second.logits, expected[:, 2:])


def test_a_cache_without_gradients_is_not_kept_beside_labels():
    model = seq2seq("sas")
    output = model(**source_and_target())
    assert returned_cache(output) is None and "cache" not in output
    assert isinstance(returned_cache(model(token_ids(1, 4), decoder_input_ids=token_ids(1, 3))), EncoderDecoderCache)
    given = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert returned_cache(model(token_ids(1, 4), decoder_input_ids=token_ids(1, 3), cache=given)) is given


@pytest.mark.parametrize("tie", [True, False], ids=["head tied", "head apart"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "two vocabularies"])
def test_ties(share, tie, tmp_path):
    """Every combination, on disk once each, and after a resize."""
    fields = {} if share else TWO
    model = seq2seq("sas", tie_word_embeddings=tie, **fields)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = [name for name in file.keys() if "embed_tokens" in name or "lm_head" in name]  # noqa: SIM118
    assert len(stored) == 1 + (not share) + (not tie)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_identical(all_tensors(loaded), all_tensors(model))
    for made in (model, loaded):
        encoder, decoder = (side.embeddings.embed_tokens for side in (made.model.encoder, made.model.decoder))
        assert (encoder.weight is decoder.weight) == share
        assert (made.lm_head.weight is decoder.weight) == tie
        made.resize_token_embeddings(70)
        sizes = [
            table.weight.shape[0]
            for table in (made.get_input_embeddings(), made.model.decoder.embeddings.embed_tokens)
        ]
        assert sizes == [70, 70 if share else 43]
        assert made.lm_head.weight.shape[0] == sizes[1]
        assert (made.config.vocab_size, made.config.decoder_vocab_size) == tuple(sizes)
        if not share:
            made.resize_decoder_token_embeddings(50)
            assert made.lm_head.weight.shape[0] == made.config.decoder_vocab_size == 50
            assert (made.lm_head.weight is made.model.decoder.embeddings.embed_tokens.weight) == tie
        else:
            with pytest.raises(ValueError, match="`share_encoder_decoder_embeddings` is True"):
                made.resize_decoder_token_embeddings(50)
        assert made(**source_and_target()).logits.shape[-1] == (70 if share else 50)


def test_base_model_and_head_load_each_other(tmp_path):
    base = seq2seq("places", model_class=SASSeq2SeqModel)
    base.save_pretrained(tmp_path / "base")
    head = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    assert type(head) is SASSeq2SeqForConditionalGeneration
    assert head.lm_head.weight is head.model.encoder.embeddings.embed_tokens.weight
    head.save_pretrained(tmp_path / "head")
    loaded = AutoModel.from_pretrained(tmp_path / "head")
    assert type(loaded) is SASSeq2SeqModel
    assert_identical(all_tensors(loaded), all_tensors(base))


def test_places_have_their_own_attention():
    model = seq2seq("places")
    encoder, decoder = model.model.encoder.layers[0].self_attn, model.model.decoder.layers[0]
    assert type(encoder).__name__ == "EfficientAttention" and not encoder.is_causal
    assert decoder.self_attn.num_simulated_groups == 3 and decoder.self_attn.is_causal
    assert decoder.self_attn.config.num_key_value_heads == 2
    # Of two heads follow heads of 16 features, as many key/value heads, and the scale of 20.
    cross = decoder.encoder_attn
    assert (cross.head_dim, cross.config.num_key_value_heads, cross.scaling) == (16, 2, 20**-0.5)
    assert not cross.is_causal


def test_places_follow_the_whole_configuration():
    """What may be changed on a live model is changed everywhere."""
    model = seq2seq("places")
    model.set_attn_implementation("eager")
    model.config.simulation_cache = "base"
    for module in model.modules():
        if hasattr(module, "q_simulation"):
            assert module.config._attn_implementation == "eager"
            assert module.config.simulation_cache == "base"


def test_the_start_of_the_decoder():
    model = seq2seq("sas", pad_token_id=1, decoder_start_token_id=5)
    labels = torch.tensor([[7, 8, 2, 9], [7, 2, 9, -100]])
    expected = torch.tensor([[5, 7, 8, 2], [5, 7, 2, 9]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), expected)
    model.config.decoder_starts_with_last_label = True
    expected = torch.tensor([[9, 7, 8, 2], [9, 7, 2, 9]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), expected)
    model.config.decoder_starts_with_last_label = False
    for name in ("decoder_start_token_id", "pad_token_id"):
        setattr(model.config, name, None)
        with pytest.raises(ValueError, match=f"`{name}` of the configuration is None"):
            model(token_ids(2, 5), labels=labels)


def test_losses_know_the_accumulated_batch():
    model = seq2seq("sas")
    inputs = source_and_target()
    counted = model(**inputs, num_items_in_batch=torch.tensor(4 * 19)).loss
    torch.testing.assert_close(4 * counted, model(**inputs).loss)


@torch.no_grad()
def test_exports():
    """With free batch and lengths."""
    model = seq2seq("sas_rope")
    batch = torch.export.Dim("batch", max=8)
    source, target = torch.export.Dim("source", min=3, max=60), torch.export.Dim("target", min=3, max=60)
    example = {"input_ids": token_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    example |= {"decoder_input_ids": token_ids(2, 7), "use_cache": False}
    shapes = {"input_ids": {0: batch, 1: source}, "attention_mask": {0: batch, 1: source}, "use_cache": None}
    program = torch.export.export(
        model, (), example, dynamic_shapes=shapes | {"decoder_input_ids": {0: batch, 1: target}}
    )
    ids, mask = left_padded(7, 4, 5)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": token_ids(3, 5), "use_cache": False}
    inputs = {name: inputs[name] for name in example}
    torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=0)


WRONG = {
    "is_causal": (False, "leave it out"),
    "is_encoder_decoder": (False, "leave it out"),
    "decoder_layers": (0, "positive integer"),
    "decoder_vocab_size": (43, "two vocabularies"),
    "cross_attention": ({"hidden_size": 16}, "it may have num_attention_heads"),
    "decoder_attention": ({"num_simulated_heads": 7}, "multiple of `num_attention_heads`"),
    "encoder_attention": ({"attention_type": "flash"}, "must be one of 'mha'"),
    "encoder_atention": ({}, "Did you mean `encoder_attention`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(name):
    value, remedy = WRONG[name]
    with pytest.raises(ValueError, match=remedy) as error:
        SASSeq2SeqConfig(**SEQ2SEQ_BASE | {name: value})
    assert name in str(error.value) and str(value) in str(error.value)


def test_wrong_inputs_are_named():
    model = seq2seq("mha")
    with pytest.raises(ValueError, match="`max_position_embeddings` = 64"):
        model(token_ids(1, 65), decoder_input_ids=token_ids(1, 3))
    with pytest.raises(ValueError, match="`max_position_embeddings` = 64"):
        model(token_ids(1, 5), decoder_input_ids=token_ids(1, 65))
    with pytest.raises(ValueError, match="`input_ids` cannot be None"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="`encoder_hidden_states` are missing"):
        model.get_decoder()(token_ids(1, 3))
    # Token mixing in cross-attention has parameters for the source's positions.
    fields = {"position_embedding_type": "rope", "cross_attention": {"attention_type": "super"}}
    model = seq2seq("mha", **fields)
    assert model(token_ids(1, 64), decoder_input_ids=token_ids(1, 70)).logits.isfinite().all()
    with pytest.raises(ValueError, match="`max_position_embeddings` = 64"):
        model(token_ids(1, 65), decoder_input_ids=token_ids(1, 3))


@torch.no_grad()
def test_super_in_cross_attention_mixes_the_source():
    """W^A has rows and columns for the source's positions, whatever the decoder's length."""
    model = seq2seq("mha", cross_attention={"attention_type": "super", "token_mixing_init": "normal"})
    (ids, mask), target = left_padded(9, 5), token_ids(1, 3)
    together = model(ids, attention_mask=mask, decoder_input_ids=target.expand(2, 3)).logits
    for row in range(2):
        alone = model(ids[row, mask[row].bool()][None], decoder_input_ids=target).logits[0]
        torch.testing.assert_close(together[row], alone)
