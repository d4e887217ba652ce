"""Pretraining with torch.compile: what Dynamo traces, without the compiler behind it, has the same losses."""

import pytest
import torch

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
