"""Switch chosen layers of a loaded model to MuSe and back. Import as `muse_hf.patches`."""

from muse_hf.patches.patching import PatchReport, patch_model, unpatch_model

__all__ = ["PatchReport", "patch_model", "unpatch_model"]
