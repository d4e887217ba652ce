"""Triton kernels for MuSe attention. Import as `muse_hf.kernels`."""
