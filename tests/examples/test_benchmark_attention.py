"""The attention benchmark: what it writes, what it refuses, and that its gate can fail."""

import csv
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import create_block_mask

from muse_hf import MuseConfig, exact_attention, muse_attention

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import benchmark_attention  # noqa: E402
import benchmark_gate  # noqa: E402
from benchmark_cases import PRESETS, Case, Inputs, Shape, file_shape  # noqa: E402
from benchmark_gate import GateError, pass_gate  # noqa: E402
from benchmark_measure import Peers, Times, relative_square, steadiest, window_mask  # noqa: E402

CPU = torch.device("cpu")
SETTING = {"local_block": 16, "cluster_size": 4, "num_retrieved": 2}
TINY = shlex.split(
    "--device cpu --heads 2 --kv_heads 1 --head_dim 8 --local_block 16 --cluster_size 4 --num_retrieved 2 "
    "--rep_ms 1"
)


def run(*arguments) -> int:
    return benchmark_attention.main([str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def muse_that(change):
    """`muse_attention` in which the Triton backend is the reference after `change` of (leaves, config)."""

    def attend(*leaves, is_causal, config):
        if config.backend == "triton":
            leaves, config = change(leaves, config)
        return muse_attention(*leaves, is_causal=is_causal, config=config.replace(backend="reference"))

    return attend


def test_a_run_leaves_rows_a_plot_and_a_table(tmp_path, capsys):
    output = tmp_path / "new/attention.csv"
    assert run(*TINY, "--seq_len", 48, 70, "--output", output) == 0
    found = rows(output)
    assert [(row["seq_len"], row["pass"]) for row in found] == [
        (length, name) for length in ("48", "70") for name in ("forward", "backward", "both")
    ]
    tensors = Inputs("normal", torch.float32, CPU).tensors(Shape(1, 2, 1, 70, 8))[:3]
    muse = muse_attention(*tensors, is_causal=True, config=MuseConfig(**SETTING))
    exact = exact_attention(*tensors, is_causal=True)
    error = ((muse - exact).square().sum() / exact.square().sum()).item()
    expected = {
        "batch": "1", "heads": "2", "kv_heads": "1", "head_dim": "8", "causal": "True", "summaries": "plain",
        "hierarchy": "flat", "num_clusters": "", "cluster_size": "4", "num_retrieved": "2",
        "local_block": "16", "backend": "reference", "inputs": "normal", "dtype": "float32",
        "exact_backend": "flash", "torch": torch.__version__, "peak_bytes": "", "window_1024_ms": "",
    }  # fmt: skip
    for row in found[3:]:
        assert {name: row[name] for name in expected} == expected
        assert float(row["rel_sq_error"]) == pytest.approx(error, rel=1e-4)
        assert float(row["speedup"]) == pytest.approx(float(row["exact_ms"]) / float(row["muse_ms"]))
        for kind in ("exact", "muse"):
            low, middle, high = (float(row[f"{kind}_{which}ms"]) for which in ("p20_", "", "p80_"))
            assert 0 < low <= middle <= high
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    setting = "plain flat n=4 r=2 t=0.003 b=16"
    for part in ("speed-up", "1x2/1x70x8 causal", setting, f"{error:.2%}", str(output)):
        assert part in printed, f"{part!r} is not in the table:\n{printed}"


def test_the_kernels_pass_the_gate():
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(Shape(1, 1, 1, 40, 16), MuseConfig(**SETTING, backend="triton"))
    assert pass_gate(case, Inputs("normal", torch.float32, device).tensors(case.shape)) < 1e-9


@pytest.mark.parametrize(
    "change",
    [
        lambda leaves, config: (leaves, config.replace(num_retrieved=1)),
        lambda leaves, config: (leaves, config.replace(kmeans_iters=0)),
        lambda leaves, config: (leaves, config.replace(cluster_size=8)),
        lambda leaves, config: ((leaves[0], leaves[1].detach() + 0 * leaves[1], leaves[2]), config),
        lambda leaves, config: ((*leaves[:2], leaves[2] * torch.nan), config),
        lambda leaves, config: ((*leaves[:2], leaves[2] * 1.3), config),
    ],
    ids=[
        "one cluster less",
        "no k-means",
        "larger clusters",
        "no key gradient",
        "NaN",
        "values 30% too large",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_sees_mistakes_of_a_backend(change, dtype, monkeypatch):
    case = Case(Shape(1, 4, 2, 200, 16), MuseConfig(**SETTING, backend="triton"))
    tensors = Inputs("clustered", dtype, CPU).tensors(case.shape)
    monkeypatch.setattr(benchmark_gate, "muse_attention", muse_that(lambda leaves, config: (leaves, config)))
    assert pass_gate(case, tensors) < 1e-4, "the reference does not pass for itself"
    monkeypatch.setattr(benchmark_gate, "muse_attention", muse_that(change))
    with pytest.raises(GateError, match="relative squared"):
        pass_gate(case, tensors)


@pytest.mark.parametrize("config", [MuseConfig(**SETTING), MuseConfig.paper(local_block=16, num_clusters=4)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_passes_as_the_limit_of_exact_attention(config, causal, monkeypatch):
    case = Case(Shape(1, 4, 2, 60, 16, causal), config.replace(backend="reference"))
    tensors = Inputs("normal", torch.float32, CPU).tensors(case.shape)
    pass_gate(case, tensors)

    def retrieves_too_little(*leaves, is_causal, config):
        return muse_attention(*leaves, is_causal=is_causal, config=config.replace(num_retrieved=3))

    monkeypatch.setattr(benchmark_gate, "muse_attention", retrieves_too_little)
    with pytest.raises(GateError, match="from exact attention"):
        pass_gate(case, tensors)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (GateError("the output is wrong"), 1, "gate failed: the output is wrong"),
        (NotImplementedError("no such kernel\nmore"), 0, "refused: no such kernel\n"),
        (MemoryError("all full"), 0, "failed: MemoryError: all full"),
    ],
)
def test_a_case_without_rows_says_why_and_the_next_is_measured(
    error, code, text, tmp_path, capsys, monkeypatch
):
    def pass_gate_but_once(case, tensors):
        if case.shape.seq_len == 20:
            raise error
        return 0.0

    monkeypatch.setattr(benchmark_attention, "pass_gate", pass_gate_but_once)
    output = tmp_path / "attention.csv"
    assert run(*TINY, "--seq_len", 20, 24, "--output", output) == code
    assert text in capsys.readouterr().out
    assert [row["seq_len"] for row in rows(output)] == ["24"] * 3


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch):
    def interrupt_second(case, tensors):
        if case.shape.seq_len == 24:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(benchmark_attention, "pass_gate", interrupt_second)
    output = tmp_path / "attention.csv"
    assert run(*TINY, "--seq_len", 20, 24, "--output", output) == 130
    assert [row["seq_len"] for row in rows(output)] == ["20"] * 3


@pytest.mark.parametrize("existing", ["attention.csv", "attention.png"])
def test_existing_files_are_refused_and_untouched(existing, tmp_path, capsys):
    (tmp_path / existing).write_text("precious")
    assert run(*TINY, "--output", tmp_path / "attention.csv") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_the_fastest_exact_kernel_is_taken_in_every_pass():
    def times(forward, backward):
        return {"forward": Times(forward, 0, 0), "backward": Times(backward, 0, 0)}

    peers = Peers(exact={"cudnn": times(1.0, 4.0), "flash": times(2.0, 3.0)})
    assert peers.fastest_exact("forward") == ("cudnn", Times(1.0, 0, 0))
    assert peers.fastest_exact("backward") == ("flash", Times(3.0, 0, 0))


@pytest.mark.parametrize("length", [500, 1024, 1500])
@pytest.mark.parametrize("window", [1, 128, 129, 300, 512])
def test_window_masks_are_those_pytorch_builds_from_every_entry(length, window):
    actual = window_mask(length, window, CPU)
    expected = create_block_mask(actual.mask_mod, None, None, length, length, device="cpu")
    assert torch.equal(actual.to_dense(), expected.to_dense()), "tiles are missing or too many"
    partial = slice(None) if length % 128 == 0 else slice(0, -1)  # PyTorch never calls the last tile full
    assert torch.equal(actual.full_kv_num_blocks[..., partial], expected.full_kv_num_blocks[..., partial])


@pytest.mark.parametrize("source", ["normal", "clustered"])
def test_inputs_are_the_same_every_time_in_the_layout_of_models(source):
    shape = Shape(2, 4, 2, 30, 8)
    first, second = (Inputs(source, torch.float32, CPU).tensors(shape) for _ in range(2))
    assert [tuple(tensor.shape) for tensor in first] == [(2, heads, 30, 8) for heads in (4, 2, 2, 4)]
    for one, other in zip(first, second):
        assert torch.equal(one, other)
        assert one.transpose(1, 2).is_contiguous(), "the heads of a token do not lie side by side"


def test_attention_to_clustered_inputs_is_peaked():
    def kept(source):
        """Share of the attention that goes to the tenth of the keys that gets most."""
        query, key, *_ = Inputs(source, torch.float32, CPU).tensors(Shape(1, 4, 2, 512, 64))
        weights = (query @ key.repeat_interleave(2, 1).mT / 8).softmax(-1)
        return weights.topk(51).values.sum(-1).mean().item()

    assert kept("clustered") > 0.8
    assert kept("normal") < 0.6


def test_activations_from_a_file(tmp_path):
    path = tmp_path / "activations.safetensors"
    query, key, value = (torch.randn(1, heads, 40, 8) for heads in (2, 1, 1))
    save_file({"query": query, "key": key, "value": value}, path)
    assert file_shape(path, causal=True) == Shape(1, 2, 1, 40, 8)
    tensors = Inputs(str(path), torch.float32, CPU).tensors(Shape(1, 2, 1, 32, 8))
    for name, actual, stored in zip(("query", "key", "value"), tensors, (query, key, value)):
        assert torch.equal(actual, stored[:, :, :32]), f"the {name} is not that of the file"
    options = shlex.split("--device cpu --local_block 16 --cluster_size 4 --rep_ms 1 --seq_len 20")
    assert run(*options, "--inputs", path, "--output", tmp_path / "new.csv") == 0
    assert {(row["inputs"], row["heads"], row["seq_len"]) for row in rows(tmp_path / "new.csv")} == {
        (str(path), "2", "20")
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"query": (1, 2, 4, 8), "key": (1, 1, 4, 8)}, "holds no value"),
        ({"query": (1, 2, 4, 8), "key": (1, 1, 4, 8), "value": (1, 1, 4, 6)}, "do not fit together"),
        ({"query": (1, 2, 4), "key": (1, 2, 4), "value": (1, 2, 4)}, "must be (batch, heads, tokens"),
        ({"query": (1, 3, 4, 8), "key": (1, 2, 4, 8), "value": (1, 2, 4, 8)}, "no multiple"),
    ],
)
def test_files_that_cannot_be_attended_to_are_refused(tensors, message, tmp_path, capsys):
    path = tmp_path / "activations.safetensors"
    save_file({name: torch.zeros(size) for name, size in tensors.items()}, path)
    assert run("--device", "cpu", "--inputs", path, "--output", tmp_path / "new.csv") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset huge", "no preset 'huge': the presets are table, "),
        ("--preset small --heads 4", "leave out --heads."),
        ("--heads 6 --kv_heads 4", "--heads (6) must be a multiple of --kv_heads (4)"),
        ("--seq_len 1024 0", "--seq_len 0 is too small"),
        ("--rep_ms nan", "--rep_ms nan is not a finite number"),
        ("--num_clusters 4 --cluster_size 4", "excludes cluster_size"),
        ("--inputs nowhere.safetensors", "'nowhere.safetensors' is no file"),
        ("--inputs {text}", "cannot be benchmarked"),
        ("--length 5", "no argument '--length'"),
        ("--output {text}/attention.csv", "cannot be written"),
        ("--output new.png", "the plot goes beside it"),
    ],
)
def test_errors_are_one_sentence(arguments, message, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("no tensors")
    arguments = shlex.split(arguments.format(text=text))
    assert run("--device", "cpu", "--output", tmp_path / "new.csv", *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in printed, printed
    assert printed.endswith("."), printed
    assert [path.name for path in tmp_path.iterdir()] == ["text"], "a refused run left something behind"


def test_the_table_holds_what_the_project_wants_to_reach():
    """In the settings that it is stated for."""
    found = {(str(case.shape), case.config.summaries) for case in PRESETS["table"]}
    assert found == {
        ("16x8x8192x64 acausal", "tilted"),
        ("16x8x8192x128 acausal", "tilted"),
        ("128x8x1024x64 acausal", "tilted"),
        ("1x16x65536x64 causal", "tilted"),
        ("1x8x16384x64 causal", "tilted"),
        ("1x16x65536x64 causal", "plain"),
        ("1x32/8x65536x64 causal", "plain"),
        ("1x16x16384x64 causal", "plain"),
        ("1x16x65536x128 causal", "plain"),
        ("1x8x262144x64 causal", "tilted"),
        ("1x8x262144x64 causal", "plain"),
    }


@pytest.mark.parametrize(
    ("measured", "kept", "times"),
    [
        ([[1.0, 0.99, 1.02]], 0, 1),
        ([[1.3, 1.0, 1.5], [1.0, 0.99, 1.02]], 1, 2),
        ([[1.3, 1.0, 1.5], [1.1, 1.0, 1.2], [1.2, 1.0, 1.4], [1.0, 1.0, 1.0]], 1, 3),
    ],
    ids=["steady", "steady the second time", "never steady"],
)
def test_times_that_spread_are_measured_again(measured, kept, times):
    left = iter(measured)
    assert steadiest(lambda: next(left)) == measured[kept]
    assert len(list(left)) == len(measured) - times


def test_relative_square_is_that_of_the_definition():
    actual, expected = torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])
    assert relative_square(actual, expected) == pytest.approx(1 / 25)


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("--help")
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "worst case" in printed
    assert "None)" not in printed, "a default is shown as None"
