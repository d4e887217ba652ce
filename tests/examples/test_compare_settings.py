"""The comparison of settings: its numbers are those of the library, its rows outlive refusals and ends."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from muse_hf import MuseConfig, patch_model, token_losses
from muse_hf.models import temporary_policy
from tests.models import byte_tokenizer, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_settings

TEXT = "".join(f"Line {n} of the text. " for n in range(120))
SETTING = "muse:local_block=32:cluster_size=4:num_retrieved=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer, and a text of about 2700 bytes."""
    path = tmp_path_factory.mktemp("settings")
    tiny_model("llama", vocab_size=257).float().save_pretrained(path / "llama")
    byte_tokenizer().save_pretrained(path / "llama")
    path.joinpath("text.txt").write_text(TEXT)
    return path


def run(folder, output, *attention, lengths=(96, 160), rows=2, more=()) -> int:
    words = ["--model", folder / "llama", "--text", folder / "text.txt", "--output", output]
    words += ["--lengths", *lengths, "--rows", rows, *more, "--attention", *attention]
    return compare_settings.main([str(word) for word in words])


def rows(output: Path) -> list[dict[str, str]]:
    with output.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def input_ids(length: int) -> torch.Tensor:
    return torch.tensor(byte_tokenizer()(TEXT)["input_ids"][: 2 * length]).view(2, length)


def test_a_run_leaves_rows_and_a_picture(folder, tmp_path, capsys):
    output = tmp_path / "new" / "settings"
    settings = [SETTING, "muse:local_block=64", "muse:setting=paper:local_block=32:num_clusters=4"]
    assert run(folder, output, *settings) == 0
    found = rows(output)
    assert [(row["setting"], row["length"]) for row in found] == [
        (s, n) for s in settings for n in ("96", "160")
    ]
    for row in found:
        assert float(row["speedup"]) == pytest.approx(float(row["exact_ms"]) / float(row["muse_ms"]))
        assert float(row["exact_loss"]) > 0
        assert float(row["loss_error"]) >= 0
        assert (row["rows"], row["reason"], row["gpu"]) == ("2", "", "cpu")
        assert row["command"].startswith("python examples/compare_settings.py --model ")
        assert row["torch"] == torch.__version__
        assert "" not in (row["transformers"], row["muse_hf"])
    assert [found[0][name] for name in ("cluster_size", "num_retrieved")] == ["4", "2"]
    assert [found[2][name] for name in ("cluster_size", "num_clusters")] == ["40", ""]
    assert [found[4][name] for name in ("cluster_size", "num_clusters")] == ["", "4"]
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert all(setting in printed for setting in settings)


def test_a_loss_is_that_of_the_patched_model(folder, tmp_path):
    everything = "muse:local_block=32:num_retrieved=99:retrieval_threshold=0"
    assert run(folder, tmp_path / "out", SETTING, everything, lengths=[160]) == 0
    found, exact = rows(tmp_path / "out")
    model = tiny_model("llama", vocab_size=257).float()
    expected = token_losses(model, input_ids(160)).mean().item()
    patch_model(model, config=MuseConfig(local_block=32, cluster_size=4, num_retrieved=2))
    increase = token_losses(model, input_ids(160)).mean().item() / expected - 1
    assert float(found["exact_loss"]) == pytest.approx(expected, abs=1e-5)
    assert float(found["loss_increase"]) == pytest.approx(increase, abs=1e-4)
    assert abs(increase) > 1e-3, "the setting changes too little to tell"
    assert float(exact["loss_increase"]) == pytest.approx(0, abs=1e-6)


def test_refused_and_failed_settings_become_rows(folder, tmp_path, monkeypatch, capsys):
    attention = compare_settings.muse_hf.muse_attention

    def breaks(*tensors, config, **options):
        if config.num_retrieved == 3:
            raise RuntimeError("out of memory\nand more")
        return attention(*tensors, config=config, **options)

    monkeypatch.setattr(compare_settings.muse_hf, "muse_attention", breaks)
    settings = ["muse:local_block=128", "muse:local_block=32:num_retrieved=3", SETTING]
    assert run(folder, tmp_path / "out", *settings, lengths=[96], more=["--rows", 1]) == 0
    refused, failed, measured = rows(tmp_path / "out")
    assert refused["reason"].startswith("refused: 96 tokens are not more than local_block=128")
    assert failed["reason"] == "failed: RuntimeError: out of memory"
    assert refused["loss_increase"] == failed["muse_ms"] == measured["reason"] == ""
    assert failed["reason"] in capsys.readouterr().out
    assert measured["loss_increase"]


def test_without_a_kernel_the_reference_tells_the_loss():
    model, ids = tiny_model("llama", vocab_size=257).float(), input_ids(96)
    dyadic = MuseConfig(local_block=32, hierarchy="dyadic")
    with temporary_policy(model):
        context = compare_settings.context(model, ids, with_loss=True)
        found, expected = (
            compare_settings.measure(model, context, dyadic.replace(backend=backend))
            for backend in ("triton", "reference")
        )
    assert found["reason"].startswith('not timed: MuseConfig.backend="triton" cannot be obeyed')
    assert found["muse_ms"] is found["speedup"] is None
    assert found["backend"] == "reference"
    assert found["loss_increase"] == expected["loss_increase"]


def test_what_is_timed_is_the_exact_model(folder, tmp_path, monkeypatch):
    """Every setting gets the queries that exact attention gets, whichever was tried before."""
    queries = []

    def milliseconds(attend, tensors, with_backward, in_a_row):
        assert with_backward
        queries.append(tensors[0])
        return 1.0

    monkeypatch.setattr(compare_settings, "attention_milliseconds", milliseconds)
    assert run(folder, tmp_path / "out", SETTING, SETTING + ":kmeans_iters=0", lengths=[96]) == 0
    exact, *others = (queries[start : start + 3] for start in range(0, len(queries), 3))
    assert len(others) == 2
    assert all(torch.equal(one, other) for found in others for one, other in zip(exact, found))
    assert [float(row["exact_ms"]) for row in rows(tmp_path / "out")] == [3.0, 3.0]


def test_a_length_without_loss(folder, tmp_path, capsys):
    more = ["--longest_loss", 100]
    assert run(folder, tmp_path / "out", SETTING, lengths=[96, 2000], more=more) == 0
    short, long = rows(tmp_path / "out")
    assert (short["rows"], long["rows"]) == ("2", "0")
    assert float(long["speedup"]) > 0
    assert short["loss_increase"] != long["loss_increase"] == long["exact_loss"] == ""


def test_a_run_cut_short_keeps_what_it_has(folder, tmp_path, monkeypatch, capsys):
    measure, calls = compare_settings.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(compare_settings, "measure", interrupted)
    assert run(folder, tmp_path / "out", SETTING) == 130
    assert len(rows(tmp_path / "out")) == 1
    assert (tmp_path / "out.png").exists()
    assert "rows measured so far are kept" in capsys.readouterr().err


@pytest.mark.parametrize("small", [False, True])
def test_the_built_in_settings_make_sense(small):
    start = MuseConfig(**compare_settings.SMALL_MUSE) if small else MuseConfig()
    settings = compare_settings.titles(small)
    configs = [compare_settings.settings_of([title], start)[title] for title in settings]
    distinct = {str(compare_settings.setting_columns(config)) for config in configs}
    assert len(distinct) == len(settings), "a setting is there twice, perhaps as the default"


@pytest.mark.parametrize(
    ("attention", "change", "message"),
    [
        ([SETTING], {"lengths": [3000]}, "the text fills 0 rows of 3000 tokens, but 1 are needed"),
        ([SETTING], {"lengths": [16]}, "16 tokens are not more than local_block=32"),
        (["fast"], {}, "--attention 'fast' must be"),
        (["muse:speed=2"], {}, "there is no argument '--speed=2'"),
        (["muse:hierarchy=steep"], {}, "invalid choice: 'steep'"),
        (["muse:layers=central"], {}, "there is no argument '--layers=central'"),
        (["muse:cluster_cap=0.5"], {}, "MuseConfig.cluster_cap=0.5"),
        (["exact"], {}, "exact attention is measured in any case"),
        ([SETTING], {"rows": 0}, "--rows 0 is too small"),
        ([SETTING], {"output": "there"}, "exists already"),
    ],
    ids=str,
)
def test_refusals_are_one_sentence(attention, change, message, folder, tmp_path, capsys):
    (tmp_path / "there.csv").touch()
    output = tmp_path / change.pop("output", "out")
    assert run(folder, output, *attention, **change) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("compare_settings.py: error: ")
    assert message in line
    assert line.endswith(".")
