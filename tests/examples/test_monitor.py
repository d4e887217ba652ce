"""The training monitor in the pretraining example: its table, its tracker, its place in the progress line."""

import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_hf import monitor
from tests.examples.running import TINY, TINY_MUSE, losses, rows, run

BLIND = ["--num_retrieved", 0, "--cluster_size", 16]  # a far block is seen as its mean


def muse_run(folder, output, *options) -> list:
    where = ["--text", folder, "--output_dir", output, "--attention", "muse", *TINY, *TINY_MUSE]
    return [*where, "--steps", 6, "--checkpoint_every", 3, "--log_every", 2, *options]


@pytest.fixture(scope="module")
def monitored(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "monitored"
    assert run(*muse_run(folder, output, "--monitor_every", 3)) == 0
    return output


def test_every_layer_is_in_the_table_and_in_the_tracker(monitored):
    table = rows(monitored / "muse/monitor.csv")
    assert [row["step"] for row in table] == ["0", "3", "6"]
    names = {"error", "lse_bias", "largest_cluster", "smallest_cluster"}
    assert set(table[0]) == {"step", *(f"muse/layer_{layer:02}/{name}" for layer in (0, 1) for name in names)}
    (events,) = monitored.glob("tensorboard/muse/events*")
    tracker = EventAccumulator(str(events)).Reload()
    for name in ("muse/layer_01/error", "muse/layer_00/lse_bias"):
        tracked = [(str(event.step), event.value) for event in tracker.Scalars(name)]
        assert tracked == [(row["step"], pytest.approx(float(row[name]))) for row in table], name


def test_the_progress_line_shows_the_largest_error(folder, tmp_path, capsys):
    assert run(*muse_run(folder, tmp_path / "run", "--monitor_every", 3)) == 0
    assert " tokens/s, MuSe error " in capsys.readouterr().err


def test_a_run_goes_on_as_if_it_had_not_been_measured(monitored, folder, tmp_path):
    assert run(*muse_run(folder, tmp_path / "run", "--monitor_every", 0)) == 0
    assert losses(tmp_path / "run", "muse") == losses(monitored, "muse")
    assert not (tmp_path / "run/muse/monitor.csv").exists()


def test_a_large_error_warns_with_advice(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(monitor, "ERROR_LIMIT", 0.15)
    caplog.set_level(logging.WARNING, logger=monitor.logger.name)
    monitor.logger.addHandler(caplog.handler)
    try:
        assert run(*muse_run(folder, tmp_path / "run", "--monitor_every", 3, *BLIND)) == 0
    finally:
        monitor.logger.removeHandler(caplog.handler)
    (row, *_) = rows(tmp_path / "run/muse/monitor.csv")
    failing = [layer for layer in (0, 1) if float(row[f"muse/layer_{layer:02}/error"]) > 0.15]
    assert failing, f"the setting was meant to fail: {row}"
    for layer in failing:
        assert f"MuSe in layer {layer} is off by " in caplog.text
    for remedy in ("kmeans_iters", "cluster_cap", "num_retrieved", "MuseConfig.layers"):
        assert remedy in caplog.text


def test_windows_no_longer_than_a_block_leave_nothing_to_measure(folder, tmp_path):
    assert run(*muse_run(folder, tmp_path / "run", "--monitor_every", 3, "--local_block", 64)) == 0
    assert not (tmp_path / "run/muse/monitor.csv").exists()
