"""The text side: any Hugging Face fast tokenizer, made ready for omni conversations, behind one small wrapper.

``prepare_tokenizer`` writes a stock Hugging Face folder with the special tokens and the chat template that training
needs. ``OmniTokenizer`` reads it. Text is encoded apart from the template, with special tokens switched off, so a
transcript that says ``<|im_end|>`` or ``<audio>`` stays text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Role

AUDIO_TOKEN = "<audio>"
VOCAB_MULTIPLE = 128
"""The vocabulary is padded to it, so that every tensor-parallel size up to it divides the embedding."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'audio' -%}<audio>{%- elif part.type == 'text' -%}{{- ('' if loop.first else ' ') + part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""ChatML without line ends between turns: six tokens for a question and its answer."""

# Private-use characters stand for the contents while a template is rendered; only the template can put others there.
_SLOT = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class TokenizerSummary:
    """What ``prepare_tokenizer`` made."""

    vocab_size: int
    padded_vocab_size: int
    """Rows of the model's embedding; those beyond ``vocab_size`` are never a target."""
    added: tuple[str, ...]
    """Special tokens that the base lacked."""


class OmniTokenizer:
    """A prepared tokenizer: ids of plain text, ids of the chat template around it, and the ids with a meaning."""

    vocab_size: int
    """One more than the largest id."""
    padded_vocab_size: int
    pad_id: int
    eos_id: int
    """End of turn."""
    audio_id: int
    """The placeholder that one audio embedding replaces."""
    fingerprint: str
    """Changes with the vocabulary, the merges, the special tokens and the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """See ``load``."""
        self.hf = tokenizer
        """The Hugging Face tokenizer itself."""
        self._with_specials = tokenizer.backend_tokenizer
        serialized = self._with_specials.to_str()
        self._plain = Tokenizer.from_str(serialized)
        self._plain.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.padded_vocab_size = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        missing = [
            what
            for what, found in {
                AUDIO_TOKEN: AUDIO_TOKEN in vocabulary,
                "a pad token": tokenizer.pad_token_id is not None,
                "an end-of-turn token": tokenizer.eos_token_id is not None,
                "a chat template": bool(tokenizer.chat_template),
            }.items()
            if not found
        ]
        if missing:
            raise InputError(f"tokenizer {tokenizer.name_or_path} lacks {', '.join(missing)}: run tools/prepare_tokenizer.py on it first")
        self.pad_id = int(tokenizer.pad_token_id)
        self.eos_id = int(tokenizer.eos_token_id)
        self.audio_id = int(vocabulary[AUDIO_TOKEN])
        identity = "\x1f".join([serialized, str(tokenizer.chat_template), str(self.pad_id), str(self.eos_id), str(self.audio_id)])
        self.fingerprint = xxhash.xxh3_128_hexdigest(identity.encode())
        self._templates: dict[tuple[Role, ...], tuple[np.ndarray, ...]] = {}

    @classmethod
    def load(cls, folder: Path | str) -> OmniTokenizer:
        """Reads a folder that ``prepare_tokenizer`` wrote; ``InputError`` for one that it did not."""
        return cls(_read(str(folder)))

    def save(self, folder: Path) -> None:
        """Writes the Hugging Face folder; the padded size stands in ``tokenizer_config.json``."""
        self.hf.init_kwargs["padded_vocab_size"] = self.padded_vocab_size
        self.hf.save_pretrained(str(folder))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it becomes a special token."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._with_specials.decode(list(ids), skip_special_tokens=True)
        return text

    def template(self, roles: tuple[Role, ...]) -> tuple[np.ndarray, ...]:
        """What the chat template puts around the contents of a conversation whose turns have these ``roles``.

        Returns int32 ids of ``len(roles) + 1`` pieces: before the first content, between contents, after the last.
        Contents never pass through the template, so nothing in them can act on it.

        Raises:
            InputError: the template refuses the roles, or drops, repeats or reorders a content.
        """
        if roles not in self._templates:
            messages = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
            try:
                text = str(self.hf.apply_chat_template(messages, tokenize=False))
            except TemplateError as error:
                raise InputError(f"the chat template of {self.hf.name_or_path} refuses the turns {list(roles)}: {error}") from error
            pieces = _SLOT.split(text)
            if [int(number) for number in pieces[1::2]] != list(range(len(roles))):
                raise InputError(
                    f"the chat template of {self.hf.name_or_path} does not show each of the turns {list(roles)} once and in order: "
                    f"it shows turns {pieces[1::2]}; use a base without a template, or one that keeps them"
                )
            encode = self._with_specials.encode
            self._templates[roles] = tuple(np.array(encode(piece, add_special_tokens=False).ids, np.int32) for piece in pieces[::2])
        return self._templates[roles]


def prepare_tokenizer(base: Path | str, out: Path) -> TokenizerSummary:
    """Makes the tokenizer ``base`` (a folder or a Hub id) ready for training and writes it to ``out``.

    Adds the placeholder ``<audio>`` and a pad token where they are missing. A base with a chat template keeps it, and
    its own end of turn becomes the end-of-sequence token; a base without one gets ``CHAT_TEMPLATE`` and its two tokens.

    Raises:
        InputError: no tokenizer there, one without a fast implementation, or a template that ends no turn.
    """
    tokenizer = _read(str(base))
    vocabulary = tokenizer.get_vocab()
    wanted = [AUDIO_TOKEN]
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        wanted += ["<|im_start|>", "<|im_end|>"]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<|pad|>"
        wanted.append("<|pad|>")
    # Also those that are there: a base may hold one as ordinary text, which must not be typed by a transcript.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in wanted], special_tokens=True)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = "<|im_end|>" if "<|im_end|>" in wanted else tokenizer.pad_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(_end_of_turn(tokenizer))
    prepared = OmniTokenizer(tokenizer)
    prepared.save(out)
    added = tuple(token for token in wanted if token not in vocabulary)
    return TokenizerSummary(prepared.vocab_size, prepared.padded_vocab_size, added)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int:
    """The first special token that the chat template puts after an assistant's content."""
    after_answer = OmniTokenizer(tokenizer).template(("user", "assistant"))[-1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    for token in after_answer.tolist():
        if token in special:
            return int(token)
    raise InputError(
        f"the chat template of {tokenizer.name_or_path} ends an assistant's turn with no special token; it needs one to stop at"
    )


def _read(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at {name}: {error}; expected a Hugging Face tokenizer folder or Hub id") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"tokenizer {name} ({type(tokenizer).__name__}) has no fast version (tokenizer.json); choose a base that has one")
    return tokenizer
