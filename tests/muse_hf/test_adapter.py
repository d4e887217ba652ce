"""The adapter behind attn_implementation="muse": masks, packing, caches, cross-attention and training."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, DataCollatorWithFlattening, DynamicCache

from muse_hf import (
    MuseConfig,
    Segments,
    UnsupportedError,
    adapter,
    muse_attention,
    patch_model,
    unpatch_model,
)
from tests.models import (
    CAUSAL_FAMILIES,
    EVERYTHING,
    FAMILIES,
    HIDDEN,
    LAYERS,
    LOCAL_BLOCK,
    LONG,
    MEDIUM,
    MUSE,
    SHORT,
    VOCABULARY,
    assert_different,
    assert_same,
    muse_model,
    output_of,
    pack,
    pad_batch,
    tiny_model,
    tokens,
)

DOCUMENTS = [tokens(LONG), tokens(SHORT, seed=2), tokens(MEDIUM, seed=3)]
TILTED = MUSE.replace(summaries="tilted", hierarchy="dyadic", multipole="dipole")
MIXED = {  # windows in the outer layers, full attention in the middle one
    "use_sliding_window": True,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def generate(model, input_ids, new_tokens=6, **options):
    """The tokens that greedy search adds to each row, never stopping early."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(input_ids, max_new_tokens=new_tokens, **options)[:, input_ids.shape[1] :]


@pytest.fixture
def muse_calls(monkeypatch):
    """The number of queries and of keys of each call that reaches MuSe."""
    calls = []

    def recorded(query, key, *arguments, **options):
        calls.append((query.shape[2], key.shape[2]))
        return attend(query, key, *arguments, **options)

    attend = adapter.muse_attention
    monkeypatch.setattr(adapter, "muse_attention", recorded)
    return calls


@pytest.fixture
def warnings_of_adapter(caplog):
    logging.Logger.warning_once.cache_clear()  # "once" is once a process
    caplog.set_level(logging.WARNING, logger=adapter.logger.name)
    return lambda: [record for record in caplog.records if record.name == adapter.logger.name]


# Turning it on


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_switching_and_patching_are_the_same(family, tmp_path):
    model = tiny_model(family)
    exact = output_of(model, tokens(LONG))
    model.save_pretrained(tmp_path)
    patch_model(model, config=MUSE)
    expected = output_of(model, tokens(LONG))
    assert_different(expected, exact, f"{family} with MuSe from exact attention")

    loaded = type(model).from_pretrained(tmp_path, attn_implementation="muse").eval()
    assert_same(output_of(loaded, tokens(LONG)), exact, "the default policy up to its local_block of 2048")
    loaded.config.muse = MUSE
    assert_same(output_of(loaded, tokens(LONG)), expected, "loaded with attn_implementation")
    switched = tiny_model(family)
    switched.set_attn_implementation("muse")
    switched.config.muse = MUSE.to_dict()
    assert_same(output_of(switched, tokens(LONG)), expected, "set_attn_implementation")
    switched.set_attn_implementation("sdpa")
    assert_same(output_of(switched, tokens(LONG)), exact, "and back")


@pytest.mark.parametrize("before_forward", [True, False])
def test_a_policy_set_by_hand_is_saved(before_forward, tmp_path):
    model = tiny_model("llama", attention="muse")
    model.config.muse = MuseConfig(
        local_block=LOCAL_BLOCK, cluster_size=4, retrieval_threshold=0.0, layers={-1: {"num_retrieved": 2}}
    )
    if not before_forward:
        output_of(model, tokens(LONG))
    assert '"num_retrieved": 2' in repr(model.config)
    model.save_pretrained(tmp_path)
    policy = AutoConfig.from_pretrained(tmp_path).muse
    assert MuseConfig.from_dict(policy).for_layer(LAYERS - 1, LAYERS) == MUSE
    again = type(model).from_pretrained(tmp_path, attn_implementation="muse").eval()
    assert_same(output_of(again, tokens(LONG)), output_of(model, tokens(LONG)), "the reloaded model")


def test_a_config_with_a_policy_makes_a_model_with_it():
    model = tiny_model("llama", attention="muse", muse=MUSE)
    assert_same(output_of(model, tokens(LONG)), output_of(muse_model("llama"), tokens(LONG)), "the new model")


def test_a_config_without_a_policy_has_none():
    config = tiny_model("llama").config
    assert not hasattr(config, "muse")
    config.muse = MUSE
    del config.muse
    assert not hasattr(config, "muse")
    assert "muse" not in config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deepcopy_has_its_own_policy(family):
    model = muse_model(family, layers=[0, -1])
    twin = copy.deepcopy(model)
    expected = output_of(model, tokens(LONG))
    assert_same(output_of(twin, tokens(LONG)), expected, "the copy", atol=0)
    patch_model(twin, config=EVERYTHING)
    assert_same(output_of(model, tokens(LONG)), expected, "the original of a patched copy", atol=0)
    unpatch_model(twin)
    assert_same(output_of(model, tokens(LONG)), expected, "the original of an unpatched copy", atol=0)
    exact = output_of(tiny_model(family), tokens(LONG))
    assert_same(output_of(twin, tokens(LONG)), exact, "the unpatched copy", atol=0)


@pytest.mark.parametrize("option", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_the_scale_of_the_logits_is_the_models(option):
    exact = output_of(tiny_model("gpt2", **option), tokens(LONG))
    assert_different(exact, output_of(tiny_model("gpt2"), tokens(LONG)), f"{option} from the usual scale")
    assert_same(output_of(muse_model("gpt2", EVERYTHING, **option), tokens(LONG)), exact, "all retrieved")


# Causality


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("config", [MUSE, TILTED], ids=["default", "tilted"])
def test_a_changed_token_changes_nothing_before_it(family, config):
    model, ids = muse_model(family, config), tokens(LONG)
    before = output_of(model, ids)
    for changed in (1, LOCAL_BLOCK - 1, LOCAL_BLOCK, 40, LONG - 1):
        other = ids.clone()
        other[0, changed] = 3 + (other[0, changed] - 2) % (VOCABULARY - 3)
        after = output_of(model, other)
        assert_same(after[:, :changed], before[:, :changed], f"before token {changed}", atol=1e-9)
        assert_different(after[:, changed:], before[:, changed:], f"from token {changed} on")


# Packing


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_packed_by_cumulative_lengths_equal_each_alone(family, layers, muse_calls):
    """With a cache too: these lengths say more than positions, which Transformers ignores beside a cache."""
    model = muse_model(family, layers=layers)
    batch, places = pack(DOCUMENTS)
    bounds = torch.tensor([0, *(place.stop for _, place in places)], dtype=torch.int32)
    packed = output_of(
        model, **batch, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=LONG, max_length_k=LONG
    )
    assert len(muse_calls) == (LAYERS if layers == "all" else 1)
    for document, place in zip(DOCUMENTS, places):
        assert_same(packed[place], output_of(model, document)[0], f"document at {place[1]}")


def test_cumulative_lengths_are_read_once_for_all_layers(monkeypatch):
    """Reading them waits for the device. Lengths that were changed in place are read again."""
    read, read_from = [], Segments.from_cu_seqlens
    monkeypatch.setattr(Segments, "from_cu_seqlens", lambda bounds: read.append(1) or read_from(bounds))
    model = muse_model("llama")
    batch, places = pack(DOCUMENTS)
    bounds = torch.tensor([0, *(place.stop for _, place in places)], dtype=torch.int32)
    together = output_of(model, **batch, cu_seq_lens_q=bounds)
    assert len(read) == 1, f"read for {len(read)} of {LAYERS} layers"
    bounds[1] -= 1
    assert not torch.equal(output_of(model, **batch, cu_seq_lens_q=bounds), together)
    assert len(read) == 2


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_flattening_collator_equals_each_document_alone(family, with_lengths, muse_calls):
    model = muse_model(family)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths)
    batch = collate([{"input_ids": document[0].tolist()} for document in DOCUMENTS])
    assert ("cu_seq_lens_q" in batch) == with_lengths
    loss, logits = model(**batch, use_cache=False)[:2]
    assert len(muse_calls) == LAYERS
    losses = []
    for document, (row, place) in zip(DOCUMENTS, pack(DOCUMENTS)[1]):
        alone = model(input_ids=document, labels=document, use_cache=False)
        assert_same(logits[row, place], alone.logits[0], f"document at {place}")
        losses.append(alone.loss * (document.shape[1] - 1))
    predicted = sum(document.shape[1] - 1 for document in DOCUMENTS)
    torch.testing.assert_close(loss, sum(losses) / predicted, msg="loss over the documents")


@pytest.mark.parametrize("by_lengths", [False, True])
def test_a_changed_document_changes_no_other(by_lengths):
    model, bounds = muse_model("llama"), torch.tensor([0, LONG, LONG + SHORT, LONG + SHORT + MEDIUM])
    how = {"cu_seq_lens_q": bounds} if by_lengths else {}
    batch, places = pack(DOCUMENTS)
    before = output_of(model, **batch, **how, use_cache=False)
    for changed, place in enumerate(places):
        ids = batch["input_ids"].clone()
        ids[place] = tokens(place[1].stop - place[1].start, seed=9)[0]
        after = output_of(model, **(batch | {"input_ids": ids}), **how, use_cache=False)
        for index, other in enumerate(places):
            same = torch.equal(after[other], before[other])
            assert same == (index != changed), f"changing document {changed} changed {index}: {not same}"


def test_every_row_of_a_batch_can_be_packed():
    model = muse_model("llama")
    first, second = pack(DOCUMENTS), pack(DOCUMENTS[::-1])
    positions = torch.cat([first[0]["position_ids"], second[0]["position_ids"]])
    both = torch.cat([first[0]["input_ids"], second[0]["input_ids"]])
    packed = output_of(model, both, position_ids=positions, use_cache=False)
    for row, (places, documents) in enumerate([(first[1], DOCUMENTS), (second[1], DOCUMENTS[::-1])]):
        for (_, place), document in zip(places, documents):
            assert_same(packed[row, place], output_of(model, document)[0], f"row {row}, document at {place}")


# Generation and caches


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_generating_for_a_left_padded_batch_equals_each_row_alone(family, muse_calls):
    model = muse_model(family)
    batch, _ = pad_batch(DOCUMENTS, "left")
    together = generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert muse_calls == [(LONG, LONG)] * LAYERS, "MuSe in the prefill of every layer and nowhere else"
    for row, document in enumerate(DOCUMENTS):
        alone = generate(model, document)
        assert together[row].tolist() == alone[0].tolist(), f"row {row} of {document.shape[1]} tokens"


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_tokens_after_a_muse_prefill_are_decoded_exactly_over_its_cache(family):
    model, ids = muse_model(family), tokens(LONG)
    generated = generate(model, ids)[0].tolist()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    by_hand = [output_of(model, ids, use_cache=False)[0, -1].argmax().item()]
    unpatch_model(model)
    while len(by_hand) < len(generated):
        logits = output_of(model, torch.tensor([by_hand[-1:]]), past_key_values=cache)
        by_hand.append(logits[0, -1].argmax().item())
    assert generated == by_hand


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("prompt", [1, LOCAL_BLOCK])
def test_generating_from_at_most_a_local_block_is_exact(family, prompt, muse_calls):
    """Also past the block: the prefill was exact, and decoding always is."""
    ids = tokens(prompt)
    expected = generate(tiny_model(family), ids, new_tokens=LOCAL_BLOCK)
    assert generate(muse_model(family), ids, new_tokens=LOCAL_BLOCK).tolist() == expected.tolist()
    assert not muse_calls


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_static_cache_is_exact(family, muse_calls):
    """Its buffer is longer than the prompt, so the prefill is exact too."""
    batch, _ = pad_batch(DOCUMENTS, "left")
    options = {"attention_mask": batch["attention_mask"], "cache_implementation": "static"}
    expected = generate(tiny_model(family), batch["input_ids"], **options)
    assert generate(muse_model(family), batch["input_ids"], **options).tolist() == expected.tolist()
    assert not muse_calls


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("prefix", [5, 40])
def test_more_keys_than_queries_are_exact(family, prefix, muse_calls):
    """A second chunk of a prompt, or a learned prefix; with and without padding in the first chunk."""
    model, exact = muse_model(family), tiny_model(family)
    batch, _ = pad_batch([tokens(LONG), tokens(LONG - 3, seed=2)], "left")
    parts = [{name: t[:, :prefix] for name, t in batch.items()}, {n: t[:, prefix:] for n, t in batch.items()}]
    parts[1]["attention_mask"] = batch["attention_mask"]
    cache = DynamicCache()
    output_of(exact, **parts[0], past_key_values=cache)
    expected = output_of(exact, **parts[1], past_key_values=copy.deepcopy(cache))
    found = output_of(model, **parts[1], past_key_values=cache)
    assert_same(found, expected, f"{LONG - prefix} tokens after {prefix}", atol=0)
    assert not muse_calls


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_chunked_prefill_of_generate_is_exact(family):
    ids = tokens(LONG)
    expected = generate(tiny_model(family), ids, prefill_chunk_size=LOCAL_BLOCK)
    found = generate(muse_model(family), ids, prefill_chunk_size=LOCAL_BLOCK)
    assert found.tolist() == expected.tolist()


# Windows in other layers


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_beside_muse_keep_their_windows(family, muse_calls):
    exact, model = tiny_model(family, **MIXED), muse_model(family, EVERYTHING, layers=[1], **MIXED)
    batch, places = pad_batch(DOCUMENTS, "left")
    expected, found = output_of(exact, **batch), output_of(model, **batch)
    assert len(muse_calls) == 1, "only the layer without a window uses MuSe"
    for place in places:
        assert_same(found[place], expected[place], f"all retrieved, row {place[0]}")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with_muse, without = (generate(each, ids, attention_mask=mask).tolist() for each in (model, exact))
    assert with_muse == without, "decoding with sliding caches"
    patch_model(model, layers=[1], config=MUSE)
    assert_different(output_of(model, tokens(LONG)), output_of(exact, tokens(LONG)), "MuSe in layer 1")
    packed, places = pack(DOCUMENTS)
    together = output_of(model, **packed, use_cache=False)
    for document, place in zip(DOCUMENTS, places):
        assert_same(together[place], output_of(model, document)[0], f"packed document at {place[1]}")


def test_windows_on_muse_layers_are_refused_at_the_first_forward():
    everywhere = tiny_model("mistral", attention="muse", sliding_window=20)
    with pytest.raises(UnsupportedError, match="layer 0 of 'mistral' asks for sliding_window=20"):
        output_of(everywhere, tokens(LONG))
    mixed = tiny_model("qwen2", attention="muse", **MIXED)
    mixed.config.muse = MUSE.replace(layers=[1, 2])
    with pytest.raises(UnsupportedError, match=r"layer 2 .* leave this layer out of MuseConfig.layers"):
        output_of(mixed, tokens(LONG))


def test_a_model_of_windows_without_muse_layers_is_untouched(muse_calls):
    ids, options = tokens(LONG), {"sliding_window": 20}
    exact, model = tiny_model("mistral", **options), muse_model("mistral", layers=[], **options)
    assert_same(output_of(model, ids), output_of(exact, ids), "the forward", atol=0)
    assert generate(model, ids).tolist() == generate(exact, ids).tolist()
    assert not muse_calls


# Cross-attention, explicit masks


@pytest.mark.parametrize("encoder_tokens", [33, LONG])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_cross_attention_stays_exact(family, encoder_tokens, muse_calls):
    """As many encoder states as queries, too, where only the module tells the two kinds apart."""
    options = {"add_cross_attention": True} | ({"is_decoder": True} if family == "bert" else {})
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, encoder_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    padding = torch.ones(2, encoder_tokens, dtype=torch.int64)
    padding[0, encoder_tokens // 2 :] = 0
    batch, places = pad_batch([tokens(LONG), tokens(MEDIUM, seed=2)], "left")
    batch |= {"encoder_hidden_states": states, "encoder_attention_mask": padding}
    expected = output_of(tiny_model(family, **options), **batch)
    found = output_of(muse_model(family, EVERYTHING, **options), **batch)
    for place in places:
        assert_same(found[place], expected[place], f"all retrieved, row {place[0]}")
    assert muse_calls == [(LONG, LONG)] * LAYERS, "MuSe in every self-attention and in nothing else"
    assert_different(output_of(muse_model(family, **options), **batch), expected, "MuSe in self-attention")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bool", "float", "holes"])
def test_explicit_masks_and_padding_with_holes_are_exact_and_warn_once(
    family, kind, muse_calls, warnings_of_adapter
):
    ids = tokens(LONG)
    mask = torch.ones(1, LONG, dtype=torch.int64)
    mask[:, 20:30] = 0
    if kind != "holes":
        mask = (mask[:, None, None] != 0) & torch.ones(LONG, LONG, dtype=torch.bool).tril()
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    model, exact = muse_model(family), tiny_model(family)
    expected = output_of(exact, ids, attention_mask=mask)
    for _ in range(2):
        assert_same(output_of(model, ids, attention_mask=mask), expected, f"mask of kind {kind}", atol=0)
    assert not muse_calls
    (warning,) = warnings_of_adapter()
    assert "explicit attention mask and attends exactly" in warning.getMessage()


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_padding_mask_of_another_length_means_what_it_means_without_muse(family):
    """Beside a cache Transformers cuts a mask that is too long and takes missing tokens for padding."""
    model, exact, ids = muse_model(family, EVERYTHING), tiny_model(family), tokens(LONG)
    for length in (LONG - 10, LONG + 10):
        mask = torch.ones(1, length, dtype=torch.int64)
        options = {"attention_mask": mask, "use_cache": True, "position_ids": torch.arange(LONG)[None]}
        expected, found = (output_of(each, ids, **options) for each in (exact, model))
        assert_same(found, expected, f"a mask of {length} for {LONG} tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_padded_and_packed_rows_do_not_warn(family, warnings_of_adapter):
    model = muse_model(family)
    output_of(model, tokens(LONG), attention_mask=torch.ones(1, LONG))
    output_of(model, **pad_batch(DOCUMENTS, ["left", "right", "left"])[0])
    if family != "bert":
        output_of(model, **pack(DOCUMENTS)[0], use_cache=False)
        generate(model, tokens(LONG), new_tokens=2)
    assert not warnings_of_adapter()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_padding_only_stay_finite(family):
    model = muse_model(family)
    batch, places = pad_batch([tokens(LONG), tokens(SHORT)], "left")
    batch["attention_mask"][1] = 0
    both = output_of(model, **batch)
    assert both.isfinite().all(), "a row without a token is not finite"
    assert_same(both[places[0]], output_of(model, tokens(LONG))[0], "the row beside it")


# Training


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_autocast_trains(family):
    model = tiny_model(family).float().train()
    patch_model(model, config=MUSE)
    batch, _ = pad_batch([tokens(LONG), tokens(MEDIUM, seed=2)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), (
            "gradient not finite"
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1, f"no training under autocast: {losses}"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_everything_retrieved_are_those_of_exact_attention(family):
    batch, places = pad_batch([tokens(LONG), tokens(MEDIUM, seed=2)], "left")
    gradients = []
    for model in (tiny_model(family), muse_model(family, EVERYTHING)):
        output = model.train()(**batch)[0]
        sum(output[place].square().mean() for place in places).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_same(
            gradients[1][name], gradient, f"gradient of {name}", atol=1e-5 * gradient.abs().max() + 1e-9
        )


def test_packed_documents_in_a_compiled_model():
    model = muse_model("llama", num_hidden_layers=1)
    packed, _ = pack([tokens(LONG, seed=1), tokens(MEDIUM, seed=2)])
    expected = output_of(model, **packed, use_cache=False)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(output_of(compiled, **packed, use_cache=False), expected, "compiled")


@pytest.mark.parametrize("config", [MUSE, MuseConfig.paper(local_block=LOCAL_BLOCK, num_clusters=4)])
def test_backward_under_autocast_keeps_to_float32(config):
    """PyTorch advises against it, but people do it; the sums of the reference must not lose precision."""
    inputs = [torch.randn(1, 2, LONG, 8) for _ in range(3)]

    def gradients(under_autocast: bool) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = muse_attention(*leaves, is_causal=True, config=config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
            output.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for inside, outside in zip(gradients(True), gradients(False)):
        assert_same(inside, outside, "a gradient", atol=1e-5)
