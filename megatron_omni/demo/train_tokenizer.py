"""A small byte-level BPE trained on the demo's corpus: a frequent word is one token, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_omni.data.tasks import FORMATS


def train_bpe(texts: Iterable[str], out: Path, vocab_size: int) -> int:
    """Trains on ``texts``, writes a Hugging Face tokenizer folder to ``out`` and returns the size of its vocabulary.

    Words are split at spaces only and all carry their space, the first one too; what the chat template and the prompts
    say is learned along with the texts, so a turn's header costs two tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^ ]+| +(?= )| +"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    prompts = [task.prompt for task in FORMATS.values() if task.prompt]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Often enough that their merges come before those of the rarest words.
    said_by_the_template = ["system\n", "user\n", "assistant\n", *prompts] * 1000
    tokenizer.train_from_iterator(chain(said_by_the_template, texts), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(out))
    return int(tokenizer.get_vocab_size())
