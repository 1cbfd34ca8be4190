"""What a checkpoint holds besides tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from megatron_omni.config.model import ModelConfig, Strict


class SavedTopology(Strict):
    """The ranks that wrote a checkpoint; any others may load it."""

    data: int
    tensor: int
    zero: Literal[0, 1, 2, 3]


class CheckpointState(Strict):
    """Everything that a continued run needs besides weights and moments.

    Learning rates are a pure function of the step, and every step reseeds from (seed, step): neither is stored.
    """

    step: int
    """Steps done; the next is this one (they count from 0)."""
    samples: int
    """Samples trained on."""
    skipped_steps: int = 0
    """Steps without an update (a gradient was not finite)."""
    topology: SavedTopology
    data: JsonValue = None
    """The data stream's own state."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """By name (tokenizer, data): what must not have changed when a run continues."""
    model: ModelConfig | None = None
    recipe: JsonValue = None

    @property
    def updates(self) -> int:
        """Adam's step counter."""
        return self.step - self.skipped_steps
