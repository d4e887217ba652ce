"""The training monitor: its numbers, its advice, and its place in a Trainer."""

import logging
import math

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from muse_hf import muse_attention
from muse_hf.models import InputError
from muse_hf.monitor import MonitorCallback, TrainingMonitor, logger, sampled_attention
from muse_hf.profiling import observed_attention
from muse_hf.reference.blocks import build_key_blocks
from tests.models import (
    EVERYTHING,
    LOCAL_BLOCK,
    LONG,
    MEDIUM,
    MUSE,
    SHORT,
    assert_different,
    assert_same,
    muse_model,
    output_of,
    pack,
    pad_batch,
    tiny_model,
    tokens,
)

TILTED = MUSE.replace(summaries="tilted", hierarchy="dyadic", multipole="dipole")
NUMBERS = {"error", "lse_bias", "largest_cluster", "smallest_cluster"}


def captured(model, input_ids):
    """Query, key, value, whether causal, and scale of each layer."""
    calls = []
    with observed_attention(lambda module, *attention: calls.append(attention)):
        output_of(model, input_ids)
    return calls


def dense_attention(query, key, value, is_causal, scale):
    """Output and logsumexp by the definition, all pairs at once."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * scale
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool(), -torch.inf)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("config", [MUSE, TILTED], ids=["plain", "tilted"])
def test_numbers_agree_with_dense_attention(family, config):
    model = muse_model(family, config)
    layers = TrainingMonitor({"input_ids": tokens(LONG)}, num_queries=LONG).measure(model).layers
    for entry, attention in zip(layers, captured(model, tokens(LONG)), strict=True):
        query, key, value, is_causal, scale = attention
        exact, exact_lse = dense_attention(*attention)
        output, lse = muse_attention(
            query, key, value, is_causal=is_causal, scale=scale, config=entry.config, return_lse=True
        )
        error = (output - exact).square().sum() / exact.square().sum()
        assert entry.error == pytest.approx(error.item(), rel=1e-4)
        assert entry.lse_bias == pytest.approx((lse - exact_lse).mean().item(), abs=1e-6)


@pytest.mark.parametrize("config", [MUSE, TILTED], ids=["plain", "tilted"])
def test_key_clusters_are_those_of_the_reference(config):
    model = muse_model("llama", config, layers=[1])
    (entry,) = TrainingMonitor({"input_ids": tokens(LONG)}).measure(model).layers
    query, key, value, *_ = captured(model, tokens(LONG))[1]
    last = LONG // LOCAL_BLOCK * LOCAL_BLOCK
    key, value = (t[0, :, :last].unflatten(1, (-1, LOCAL_BLOCK)) for t in (key, value))
    grouped = query[0, :, :last].unflatten(1, (-1, LOCAL_BLOCK)).unflatten(0, (key.shape[0], -1))
    sizes = build_key_blocks(key, value, grouped, None, entry.config).filled.sum(-1)
    assert (entry.largest_cluster, entry.smallest_cluster) == (sizes.max().item(), sizes.min().item())
    if config is MUSE:
        assert entry.empty_query_clusters is None
    else:
        assert 0 <= entry.empty_query_clusters < 1


def test_a_sample_of_queries_is_the_same_attention_at_these_queries():
    attention = captured(muse_model("llama"), tokens(LONG))[1]
    query, key, value, is_causal, scale = attention
    sample = torch.tensor([0, 7, LOCAL_BLOCK, LONG - 1])
    output, lse = sampled_attention(query, key, value, sample, is_causal=is_causal, scale=scale)
    expected, expected_lse = dense_attention(*attention)
    assert_same(output, expected[:, :, sample], "output")
    assert_same(lse, expected_lse[:, :, sample], "logsumexp")


def test_equal_tokens_lose_their_query_clusters():
    model = muse_model("gpt2", TILTED)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()  # without positions, equal tokens have equal queries
    (entry, *_) = TrainingMonitor({"input_ids": torch.full((1, LONG), 5)}).measure(model).layers
    assert entry.empty_query_clusters == 0.75  # one of the four clusters of a block has all its queries


def test_logs_are_plain_floats_of_the_layers_that_use_muse():
    model = muse_model("llama", MUSE, layers=[0, 2])
    measurement = TrainingMonitor({"input_ids": tokens(LONG)}).measure(model)
    logs = measurement.to_logs()
    assert set(logs) == {f"muse/layer_{layer:02}/{name}" for layer in (0, 2) for name in NUMBERS}
    assert all(type(value) is float for value in logs.values())
    assert "MuSe error" in str(measurement)
    assert len(str(measurement)) < 60
    tilted = TrainingMonitor({"input_ids": tokens(LONG)}).measure(muse_model("llama", TILTED, layers=[0]))
    assert "muse/layer_00/empty_query_clusters" in tilted.to_logs()


def test_the_longest_sequence_of_the_batch_is_measured():
    alone = TrainingMonitor({"input_ids": tokens(LONG)}).measure(muse_model("llama"))
    documents = [tokens(SHORT, seed=2), tokens(LONG), tokens(MEDIUM, seed=3)]
    for batch in (pack(documents)[0], pad_batch(documents, "left")[0]):
        assert TrainingMonitor(batch).measure(muse_model("llama")) == alone


def test_measuring_leaves_no_trace():
    model = muse_model("llama").train()
    policy, expected, state = model.config.muse, output_of(model, tokens(LONG)), torch.get_rng_state()
    TrainingMonitor({"input_ids": tokens(LONG)}).measure(model)
    assert model.training
    assert model.config.muse == policy
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output_of(model, tokens(LONG)), expected)


def test_warns_once_a_layer_with_advice(caplog):
    caplog.set_level(logging.WARNING, logger=logger.name)
    logger.addHandler(caplog.handler)
    try:
        model = muse_model("llama", MUSE.replace(num_retrieved=0, cluster_size=16), layers=[1])
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight.mul_(50)
        monitor = TrainingMonitor({"input_ids": tokens(LONG)})
        entry = monitor.measure(model).layers[0]
        assert entry.error > 0.25
        monitor.measure(model)
        exact = muse_model("llama", EVERYTHING)
        TrainingMonitor({"input_ids": tokens(LONG)}).measure(exact)
    finally:
        logger.removeHandler(caplog.handler)
    messages = {record.message for record in caplog.records}
    assert messages == {entry.advice()}
    for word in ("layer 1", f"{entry.error:.0%}", "kmeans_iters", "cluster_cap", "num_retrieved", "layers"):
        assert word in entry.advice()


def test_refuses_what_has_nothing_to_measure():
    with pytest.raises(InputError, match="no MuSe layer"):
        TrainingMonitor({"input_ids": tokens(LONG)}).measure(tiny_model("llama"))
    with pytest.raises(InputError, match="longer one"):
        TrainingMonitor({"input_ids": tokens(SHORT)}).measure(muse_model("llama"))
    with pytest.raises(ValueError, match="at least 1"):
        TrainingMonitor({"input_ids": tokens(LONG)}, every=0)


def test_trainer_with_packed_documents(tmp_path):
    documents = [
        {"input_ids": tokens(length, seed=seed)[0].tolist()}
        for seed, length in enumerate((LONG, SHORT, MEDIUM, LONG, MEDIUM, SHORT, LONG, MEDIUM))
    ]
    collator = DataCollatorWithFlattening()
    model = muse_model("llama").float()
    assert model.config._attn_implementation == "muse"
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collator)
    monitor = TrainingMonitor(collator(documents[:2]), every=2)
    trainer.add_callback(MonitorCallback(monitor, trainer.log))
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    measured = [entry["step"] for entry in trainer.state.log_history if "muse/layer_01/error" in entry]
    assert measured == [0, 2, 4]

    # The trained model, on a batch of the Trainer's own collator: another first document changes nothing
    # in the second one.
    others = [{"input_ids": tokens(LONG, seed=90)[0].tolist()}, documents[2]]
    batches = [collator([documents[0], documents[2]]), collator(others)]
    first, second = (output_of(model, b["input_ids"], position_ids=b["position_ids"]) for b in batches)
    assert_same(first[:, LONG:], second[:, LONG:], "second document")
    assert_different(first[:, :LONG], second[:, :LONG], "first document")
