"""What is evaluated of a data set: some samples, in order; what each is asked and should say; their codes exchanged."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_omni.config.model import CodecConfig
from megatron_omni.data.rows.demands import Samples
from megatron_omni.data.tasks import target_text
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Message, Part, Sample, SampleArrays

Donors = Mapping[int, Mapping[str, tuple[int, str]]]
"""By number and name of codes in a data set: number and name of the codes that replace them."""


@dataclass(frozen=True)
class Selection:
    """The samples ``numbers`` of ``base``, with the codes that ``donors`` gives them; a data set itself."""

    base: Samples
    numbers: Sequence[int]
    donors: Donors = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return repr((self.base.fingerprint, tuple(self.numbers), self.donors))

    @property
    def codec(self) -> CodecConfig | None:
        return self.base.codec

    def __len__(self) -> int:
        return len(self.numbers)

    def sample(self, number: int, /) -> Sample:
        sample = self.base.sample(mine := self.numbers[number])
        given = {name: self.base.sample(other).num_frames[theirs] for name, (other, theirs) in self.donors.get(mine, {}).items()}
        return dataclasses.replace(sample, num_frames=sample.num_frames | given)

    def arrays(self, number: int, /) -> SampleArrays:
        arrays = self.base.arrays(mine := self.numbers[number])
        given = {name: self.base.arrays(other).codes[theirs] for name, (other, theirs) in self.donors.get(mine, {}).items()}
        return dataclasses.replace(arrays, codes=arrays.codes | given)


def question(sample: Sample) -> tuple[Message, ...]:
    """The conversation up to the last answer, which is what the model is to generate; earlier answers as they were learned.

    Raises:
        InputError: the conversation does not end with an answer.
    """
    if not sample.messages or sample.messages[-1].role != "assistant":
        raise InputError(f"sample {sample.id}: its last turn is not the assistant's, so there is no answer to compare with")
    return tuple(_as_learned(message, sample) if message.role == "assistant" else message for message in sample.messages[:-1])


def answer(sample: Sample) -> str | None:
    """The text of the last turn as it was learned; None for an answer in codes only."""
    texts = [part.value for part in _as_learned(sample.messages[-1], sample).content if part.type == "text"]
    return " ".join(texts) if texts else None


def last_codes(sample: Sample) -> list[str]:
    """Names of the codes in the last turn."""
    return [part.value for part in sample.messages[-1].content if part.type == "codes"]


def spoken_texts(sample: Sample) -> dict[str, str]:
    """The text that conditions each codes array of the sample, by its name; codes without a text are left out."""
    spoken: dict[str, str] = {}
    for message in sample.messages:
        text: str | None = None
        for part in _as_learned(message, sample).content:
            if part.type == "text":
                text = part.value
            elif part.type == "codes" and text is not None:
                spoken[part.value] = text
    return spoken


def exchange_codes(samples: Sequence[Sample], seed: int = 0) -> Donors | None:
    """Gives every codes array that follows a text the codes of another text, each used once; the sample numbers count ``samples``.

    Groups of equal texts lie side by side in a seeded order, which is then shifted by the size of the largest: nobody
    meets the own group. None where that is impossible: half of the texts and more are the same, or there are none.
    """
    slots = [(number, name, text) for number, sample in enumerate(samples) for name, text in spoken_texts(sample).items()]
    if not slots:
        return None
    random = rng("exchange", seed)
    _, group, sizes = np.unique([text for *_, text in slots], return_inverse=True, return_counts=True)
    if 2 * (largest := int(sizes.max())) > len(slots):
        return None
    order = random.permutation(len(slots))
    order = order[np.argsort(random.permutation(len(sizes))[group[order]], kind="stable")]
    donors: dict[int, dict[str, tuple[int, str]]] = defaultdict(dict)
    for mine, theirs in zip(order.tolist(), np.roll(order, -largest).tolist(), strict=True):
        donors[slots[mine][0]][slots[mine][1]] = slots[theirs][:2]
    return dict(donors)


def _as_learned(message: Message, sample: Sample) -> Message:
    """With the task's letter case on its texts."""
    parts = (Part(part.type, target_text(sample.task, part.value)) if part.type == "text" else part for part in message.content)
    return Message(message.role, tuple(parts))
