"""What an installation promises: the names that importing brings, one version, a README that runs."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import muse_hf
from tests.models import tiny_model

README = Path(__file__).parents[1] / "README.md"


def test_importing_leaves_the_name_kernels_to_hugging_face(tmp_path):
    """Transformers looks for a package `kernels` of its own; ours is a part of muse_hf and nothing else.

    In a fresh interpreter, and not in the repository, whose folders Python would offer as packages.
    """
    script = """if True:
        import sys
        import muse_hf, muse_hf.kernels, muse_hf.patches
        found = {"kernels", "patches"} & sys.modules.keys()
        assert not found, f"import muse_hf brings top-level packages: {found}"
        assert not hasattr(muse_hf.kernels, "__version__"), "Transformers could take it for its own package"
    """
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_package_has_one_version():
    assert importlib.metadata.version("muse_hf") == muse_hf.__version__


def test_everything_in_all_is_there():
    assert not [name for name in muse_hf.__all__ if not hasattr(muse_hf, name)]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """One block after the other, as a reader pastes them into one session, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("tiny")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2, "the README shows how to load a model and how to patch one"
    session = {}
    for number, block in enumerate(blocks):
        code = block.replace("path/to/model", "tiny")
        exec(compile(code, f"python block {number} of README.md", "exec"), session)
    assert "LlamaForCausalLM: MuSe attention in" in capsys.readouterr().out, "no report was printed"
