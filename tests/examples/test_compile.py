"""Pretraining with torch.compile: what Dynamo traces, without the compiler behind it, has the same losses."""

import pytest
import torch
from transformers import FalconConfig

from tests.examples.running import TINY, TINY_MUSE, losses, run


@pytest.mark.parametrize("attention", ["exact", "muse"])
def test_a_compiled_model_has_the_same_losses(attention, folder, tmp_path, monkeypatch):
    compile_module, compiled = torch.nn.Module.compile, []

    def traced(module):
        compiled.append(module)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    where = ["--text", folder, "--attention", attention, *TINY, *TINY_MUSE, "--steps", 4, "--loss_chunk", 50]
    assert run(*where, "--output_dir", tmp_path / "plain") == 0
    assert not compiled
    assert run(*where, "--output_dir", tmp_path / "compiled", "--compile") == 0
    assert len(compiled) == 1
    plain, same = (losses(tmp_path / name, attention) for name in ("plain", "compiled"))
    assert [float(loss) for _, loss in same] == pytest.approx([float(loss) for _, loss in plain], rel=1e-4)
    config = (tmp_path / "compiled" / attention / "model" / "config.json").read_text()
    assert ('"muse"' in config) == (attention == "muse"), "an exact model is saved as Transformers' own"


def test_a_family_without_support_is_refused_in_a_sentence(folder, tokenizer, tmp_path, capsys):
    checkpoint = tmp_path / "falcon"
    FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        checkpoint
    )
    where = ["--text", folder, "--checkpoint", checkpoint, "--attention", "exact", "--compile"]
    where += ["--tokenizer", tmp_path / "tokenizer", "--context_length", 64, "--output_dir", tmp_path / "run"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert run(*where) == 2
    assert "cannot be trained" in capsys.readouterr().err


def test_the_monitor_compiles_nothing(folder, tmp_path, monkeypatch):
    """Each measurement would be a graph of its own, and soon one more than the compiler keeps."""
    compile_module, graphs = torch.nn.Module.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=count))
    where = ["--text", folder, "--attention", "muse", *TINY, *TINY_MUSE, "--compile"]
    where += ["--num_layers", 1, "--steps", 3]
    compiled = {}
    for every in (0, 1):
        torch.compiler.reset()
        graphs.clear()
        assert run(*where, "--output_dir", tmp_path / str(every), "--monitor_every", every) == 0
        compiled[every] = len(graphs)
    assert compiled[1] == compiled[0] > 0
