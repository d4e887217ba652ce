"""Several attentions side by side, in one run or in several: which may be compared, and what is published."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from tests.examples.running import TINY, TINY_MUSE, losses, pretrain, rows, run

# isort: split
import compare_runs
from pretrain_report import comparison_text, relative, table_text
from results import curve, step_seconds

VARIANT = "muse:num_retrieved=0:layers=1"


def arguments(folder, output, *attentions) -> list:
    where = ["--text", folder, "--output_dir", output, *TINY, *TINY_MUSE, "--steps", 16, "--eval_every", 8]
    return [*where, "--attention", *attentions]


@pytest.fixture(scope="module")
def three(folder, tmp_path_factory):
    """One run with exact attention, MuSe, and MuSe in another setting."""
    output = tmp_path_factory.mktemp("runs") / "three"
    assert run(*arguments(folder, output, "muse", VARIANT), "--compare") == 0
    return output


@pytest.fixture(scope="module")
def apart(folder, tmp_path_factory):
    """The same with a run for each."""
    output = tmp_path_factory.mktemp("apart")
    for name, attention in {"exact": "exact", "all": "muse", "one": VARIANT}.items():
        assert run(*arguments(folder, output / name, attention)) == 0
    return output


def published(path) -> dict:
    return json.loads(path.read_text())


def test_each_attention_trains_with_its_own_setting(three):
    results = published(three / "summary.json")["results"]
    assert list(results) == ["exact", "muse", VARIANT]
    assert results["exact"]["muse"] is None
    settings = [results[name]["muse"] for name in ("muse", VARIANT)]
    assert [(muse["layers"], muse["num_retrieved"]) for muse in settings] == [("all", 2), ("1", 0)]
    starts = [float(losses(three, name)[0][1]) for name in ("exact", "muse", "muse-num_retrieved-0-layers-1")]
    assert starts == pytest.approx([starts[0]] * 3, abs=0.02), "the first batches or weights differ"
    assert len(set(starts)) == 3, "an attention has the losses of another one"


def test_a_result_says_how_it_came_about(three):
    result = published(three / "muse/result.json")
    run = result["run"]
    assert run["command"].startswith("python examples/pretrain.py --text ")
    assert run["command"].endswith(f"--attention muse {VARIANT} --compare")
    assert {"torch", "transformers", "muse_hf", "python"} <= set(run["versions"])
    assert run["hardware"]
    assert result["earlier_machines"] == []
    assert run["packages"] == {}
    fast, slow = result["seconds_per_step_20_80"]
    assert fast <= result["seconds_per_step"] <= slow
    model = AutoModelForCausalLM.from_pretrained(three / result["model"])
    assert result["parameters"] == model.num_parameters()
    assert (result["tokens"], result["steps"], run["processes"]) == (16 * 2 * 64, 16, 1)
    assert len(result["training_curve"]) == 16
    assert [tokens for tokens, _ in result["held_out_curve"]] == [1024, 2048]
    assert result["held_out_loss"] == result["held_out_curve"][-1][1]
    assert [row["step"] for row in result["monitor"]] == [0]


def test_a_model_trained_with_muse_is_evaluated_with_exact_attention_too(three):
    muse = published(three / "muse/result.json")
    assert len(muse["exact_attention_losses"]) == len(muse["held_out_losses"]) == 4
    assert muse["exact_attention_losses"] != muse["held_out_losses"]
    assert muse["exact_attention_losses"] == pytest.approx(muse["held_out_losses"], rel=0.05)
    assert "exact_attention_losses" not in published(three / "exact/result.json")


def test_runs_made_apart_compare_as_one_run_does(three, apart, tmp_path, capsys):
    runs = [f"exact={apart / 'exact'}", apart / "all/muse/result.json", f"{VARIANT}={apart / 'one'}"]
    output = tmp_path / "new/comparison"
    assert compare_runs.main(["--runs", *map(str, runs), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    one, several = published(three / "summary.json"), published(output.with_suffix(".json"))
    for whole, part in zip(one["table"], several["table"], strict=True):
        for name in set(part) - {"seconds_per_step", "tokens_per_second", "time_change"}:
            assert part.get(name) == whole.get(name), name
    assert table_text(several["table"]) in printed
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"

    # What it has written can be joined by another run.
    shutil.copytree(apart / "one", tmp_path / "two")
    more = [
        "--runs",
        str(output.with_suffix(".json")),
        f"again={tmp_path / 'two'}",
        "--output",
        str(tmp_path / "more"),
    ]
    assert compare_runs.main(more) == 0
    assert list(published(tmp_path / "more.json")["results"]) == ["exact", "muse", VARIANT, "again"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "name at least one run"),
        (["{apart}/exact", "{apart}/exact"], "two trainings are called 'exact'"),
        (["name={three}"], "holds 3 trainings"),
        (["{apart}"], "there is no finished training in"),
        (["{apart}/nowhere"], "is no result of a training"),
        (["{apart}/all/config.json"], "is no result of a training"),
        (["{apart}/exact", "{other}"], "cannot be compared, because they differ in learning_rate"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, message, three, apart, folder, tmp_path, capsys):
    if "{other}" in runs:
        assert run(*arguments(folder, tmp_path / "other", "muse"), "--learning_rate", 1e-3) == 0
    paths = [path.format(apart=apart, three=three, other=tmp_path / "other") for path in runs]
    options = ["--runs", *paths] if paths else []
    assert compare_runs.main([*options, "--output", str(tmp_path / "comparison")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "comparison.json").exists()


def test_a_relative_loss_has_the_error_of_its_mean():
    change, error = relative([2.02, 2.06], [2.0, 2.0])
    assert change == pytest.approx(0.02)
    assert error == pytest.approx(0.01)
    assert relative([2.02], [2.0])[1] is None


def test_both_evaluations_of_a_muse_model_have_an_error(three):
    for row in published(three / "summary.json")["table"][1:]:
        for name in ("standard_error", "standard_error_under_exact_attention"):
            assert 0 < row[name] < 0.1, f"{row['name']}: {name}"
        assert table_text([row]).count("±") == 2


def test_times_of_steps_are_those_behind_the_warm_up():
    speeds = [10.0] * 8 + [50.0, 100.0, 100.0, 1.0, 100.0]
    table = [{"step": step, "tokens": 100 * step, "tokens_per_second": v} for step, v in enumerate(speeds, 1)]
    assert step_seconds(table) == [1.0, 100.0, 1.0]
    assert step_seconds(table[:8]) == [10.0] * 8, "a short training has its warm-up only"


def test_a_long_curve_is_thinned_by_means():
    table = [{"tokens": 10 * step, "loss": float(step % 2)} for step in range(1, 401)]
    points = curve(table)
    assert len(points) == 200
    assert points[0] == [20, 0.5]
    assert points[-1] == [4000, 0.5]


@pytest.mark.parametrize(("change", "slower"), [(-0.5, False), (1.0, True)])
def test_the_summary_says_when_muse_was_slower(change, slower, three):
    summary = published(three / "summary.json")
    for row in summary["table"][1:]:
        row["time_change"] = change
    assert ("exact attention is faster than muse" in comparison_text(summary, three)) == slower


def test_a_run_out_of_time_goes_on_where_it_stopped(three, folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert run(*arguments(folder, output, "exact", "muse", VARIANT), "--max_minutes", 1e-9) == 3
    printed = capsys.readouterr().err
    assert f"exact is paused after step 4 of 16; go on with --resume --output_dir {output}." in printed, (
        printed
    )
    assert run("--resume", "--output_dir", output, "--max_minutes", 1e-9) == 3
    assert "exact is paused after step 8 of 16" in capsys.readouterr().err
    assert run("--resume", "--output_dir", output, "--max_minutes", 10) == 0
    assert losses(output) == losses(three), "the resumed run has other losses"
    assert rows(output / "exact/held_out.csv") == rows(three / "exact/held_out.csv")


def test_a_stopped_run_has_trained_nothing_twice(three, monkeypatch):
    monkeypatch.setattr(pretrain, "train", lambda *_: pytest.fail("a finished training was done again"))
    assert run("--resume", "--output_dir", three) == 0
