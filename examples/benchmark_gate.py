"""The gate before a benchmark row: is what will be timed correct on these inputs?

It looks at few heads and a few local blocks, so that it is quick. Its bounds were chosen by what the
reference itself does when its inputs are disturbed by one rounding, and by what mistakes do (a missing
dipole, other clusters, fewer of them retrieved). In low precision it finds gross mistakes only; the tests of
the kernels find the others.
"""

from collections.abc import Sequence

import torch
from benchmark_cases import Case
from benchmark_measure import Attend, gradients, relative_square

from muse_hf import MuseConfig, exact_attention, muse_attention

_NAMES = ("output", "query gradient", "key gradient", "value gradient")
# Relative squared distances. In low precision tokens choose another of two nearly equal clusters, which moves
# outputs and gradients by more than rounding does, and most where nothing is clustered.
_NEAR = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# Where nothing is chosen, only rounding is left.
_EQUAL = {torch.float32: 1e-8, torch.bfloat16: 1e-4, torch.float16: 1e-5}
# Error against exact attention, relative to the reference's: nearly equal choices are nearly equally good.
_ERROR_RATIO = 0.05
_BLOCKS, _HEADS = 3, 2


class GateError(Exception):
    """What was going to be timed is wrong; the message says what and by how much."""


def pass_gate(case: Case, tensors: Sequence[torch.Tensor]) -> float:
    """Compare the backend of the case with the reference; the reference itself with exact attention.

    Args:
        case: Shape and setting, whose `backend` is what will be timed.
        tensors: Query, key, value and output gradient of the whole case.

    Returns:
        The largest relative squared distance, of the output or a gradient.

    Raises:
        GateError: They differ.
        NotImplementedError: The backend does not serve the case.
    """
    part = _part(case, tensors)
    if case.config.backend == "reference":
        return _exact_if_all_is_retrieved(case, part)
    return _as_reference(case, part)


def _as_reference(case: Case, part: Sequence[torch.Tensor]) -> float:
    """Near the reference in float32 on the same numbers, and as near as that to exact attention."""
    causal, precise = case.shape.causal, [tensor.float() for tensor in part]
    actual = gradients(_muse(case.config, causal), part)
    expected = gradients(_muse(case.config.replace(backend="reference"), causal), precise)
    distance = _check(actual, expected, _NEAR[part[0].dtype], "the reference in float32")
    exact = exact_attention(*precise[:3], is_causal=causal)
    error, reference_error = (relative_square(output, exact) for output in (actual[0], expected[0]))
    if abs(error - reference_error) > _ERROR_RATIO * reference_error + _EQUAL[part[0].dtype]:
        raise GateError(
            f"the output's relative squared error is {error:.2e}, the reference's {reference_error:.2e}"
        )
    return distance


def _exact_if_all_is_retrieved(case: Case, part: Sequence[torch.Tensor]) -> float:
    """The limit case: with all clusters retrieved MuSe is exact attention."""
    causal = case.shape.causal
    config = case.config.replace(num_retrieved=part[0].shape[2], retrieval_threshold=0.0)

    def exact(*leaves: torch.Tensor) -> torch.Tensor:
        return exact_attention(*leaves, is_causal=causal)

    actual, expected = gradients(_muse(config, causal), part), gradients(exact, part)
    return _check(actual, expected, _EQUAL[part[0].dtype], "exact attention, with all clusters retrieved")


def _check(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], bound: float, other: str
) -> float:
    distances = {name: relative_square(*pair) for name, *pair in zip(_NAMES, actual, expected)}
    for name, distance in distances.items():
        if not distance <= bound:  # nor NaN
            raise GateError(f"relative squared distance of the {name} from {other}: {distance:.1e}")
    return max(distances.values())


def _muse(config: MuseConfig, causal: bool) -> Attend:
    return lambda *leaves: muse_attention(*leaves, is_causal=causal, config=config)


def _part(case: Case, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One sequence, two key/value heads with their queries, three local blocks and a part of a fourth."""
    shape, block = case.shape, case.config.local_block
    kv_heads = min(_HEADS, shape.kv_heads)
    heads = kv_heads * shape.heads // shape.kv_heads
    length = min(shape.seq_len, _BLOCKS * block + block // 2 + 1)
    query, key, value, grad = tensors
    return [
        tensor[:1, :count, :length]
        for tensor, count in ((query, heads), (key, kv_heads), (value, kv_heads), (grad, heads))
    ]
