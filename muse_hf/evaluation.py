"""`evaluate_policy`: a model's loss and prefill time with exact and with MuSe attention, side by side."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from muse_hf.config import MuseConfig
from muse_hf.models import (
    InputError,
    check_length,
    check_uses_muse,
    hidden_states,
    predicts_next_token,
    temporary_policy,
    token_losses,
    transformers_model,
)
from muse_hf.profiling import device_name, milliseconds

PARTS = 8  # of the context, for the loss by position


@dataclass(frozen=True)
class Measured:
    """One attention on all rows.

    Attributes:
        loss: Mean over all tokens, in nats.
        by_position: Mean loss in each eighth of the context, the first eighth first.
        prefill_ms: Time of a forward pass over one row, without the language-model head, in milliseconds.
    """

    loss: float
    by_position: list[float]
    prefill_ms: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_policy` found; print it.

    Attributes:
        model, device, dtype, rows, length: As in `Profile`.
        policy: What "MuSe" stands for.
        exact, muse: The two attentions.
    """

    model: str
    device: str
    dtype: str
    rows: int
    length: int
    policy: MuseConfig
    exact: Measured
    muse: Measured

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON types."""
        return asdict(self) | {"policy": self.policy.to_dict()}

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.rows} x {self.length} tokens, {self.dtype} on {self.device}",
            f"{'':20}{'exact':>12}{'MuSe':>12}{'difference':>13}",
        ]

        def add(title: str, exact: float, muse: float, digits: int = 4) -> None:
            lines.append(f"{title:20}{exact:12.{digits}f}{muse:12.{digits}f}{muse / exact - 1:+13.2%}")

        add("loss (nats/token)", self.exact.loss, self.muse.loss)
        for part, losses in enumerate(zip(self.exact.by_position, self.muse.by_position)):
            start, end = (self.length * edge // PARTS for edge in (part, part + 1))
            add(f"  {start:>7} to {end:>7}", *losses)
        add("prefill (ms)", self.exact.prefill_ms, self.muse.prefill_ms, digits=1)
        return "\n".join(lines)


def evaluate_policy(model: torch.nn.Module, input_ids: torch.Tensor, policy: MuseConfig) -> Evaluation:
    """Loss, loss by position and prefill time with exact attention and under a policy.

    The model is left as it was.

    Args:
        model: A Transformers model with a next-token loss, also inside a wrapper.
        input_ids: (B, N) tokens without padding, at least 16 a row.

    Raises:
        InputError: The model has no next-token loss, the text has the wrong length, or all layers attend
            exactly at it.
    """
    base = transformers_model(model)
    if not predicts_next_token(base):
        raise InputError(f"{type(base).__name__} has no next-token loss; profile_layers compares its outputs")
    if input_ids.shape[1] < 2 * PARTS:
        raise InputError(f"{input_ids.shape[1]} tokens are too few for a loss in each eighth of them")
    check_length(base.config, input_ids.shape[1])
    check_uses_muse(base, policy, input_ids.shape[1])
    rows = input_ids.to(base.device).split(1)

    def measured(policy: MuseConfig) -> Measured:
        base.config.muse = policy
        losses = torch.cat([token_losses(base, row) for row in rows]).double().mean(0)
        # Position 0 has no loss: the first eighth is one token shorter.
        edges = [(len(losses) + 1) * part // PARTS - 1 for part in range(1, PARTS)]
        return Measured(
            loss=losses.mean().item(),
            by_position=[part.mean().item() for part in losses.tensor_split(edges)],
            prefill_ms=milliseconds(partial(hidden_states, base, rows[0]), base.device),
        )

    with temporary_policy(base):
        return Evaluation(
            model=type(base).__name__,
            device=device_name(base.device),
            dtype=str(base.dtype).removeprefix("torch."),
            rows=len(rows),
            length=input_ids.shape[1],
            policy=policy,
            exact=measured(MuseConfig(layers=[])),
            muse=measured(policy),
        )
