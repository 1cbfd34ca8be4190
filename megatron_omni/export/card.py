"""``README.md`` of an exported model: what it is, how it was trained, how to run it."""

from __future__ import annotations

from megatron_omni.checkpoint.state import CheckpointState
from megatron_omni.config.model import ModelConfig, TransformerConfig

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: any-to-any
tags: [speech, audio, omni]
---

# {name}

A speech language model: audio and text in, text and speech out. Trained with `megatron_omni`.

| part | shape |
|---|---|
{parts}

{parameters:,} parameters without the codec, stored as {dtype}. Codec: {codebooks} codebooks of {card} entries at {frame_rate:g} Hz, weights
sha256 `{codec_hash}`. Audio in: mono, {sample_rate} Hz. Acoustic delay: {delay} frames.

## Training

{steps:,} steps, {samples:,} samples, on {ranks} ranks (data parallel {data} x tensor parallel {tensor}, ZeRO stage {zero}).

| fingerprint | |
|---|---|
{fingerprints}

## Use

```python
from megatron_omni.export import OmniForConditionalGeneration, OmniProcessor

model = OmniForConditionalGeneration.from_pretrained("{name}")
processor = OmniProcessor.from_pretrained("{name}")
question = [{{"role": "user", "content": [{{"type": "audio", "audio": "question.wav"}}]}}]
speech = model.generate_speech(**processor(question))
print(processor.batch_decode(speech.sequences), speech.waves[0].shape, speech.sample_rate)
```

`llm/` is the language model alone, a plain Llama: `AutoModelForCausalLM.from_pretrained("{name}/llm")`.
"""


def model_card(name: str, model: ModelConfig, state: CheckpointState, parameters: int, dtype: str) -> str:
    """Markdown with the front matter of the Hugging Face Hub."""
    assert model.codec is not None
    head, topology = model.audio_head, state.topology
    stacks = {
        "audio encoder": model.encoder.stack,
        "LLM": model.llm.stack,
        "Pre-NN": head.pre_nn,
        "codec decoder": head.decoder,
        "Depformer": head.depformer,
    }
    return TEMPLATE.format(
        name=name,
        parts="\n".join(f"| {part} | {_describe(stack)} |" for part, stack in stacks.items()),
        parameters=parameters,
        dtype=dtype,
        codebooks=model.codec.num_codebooks,
        card=model.codec.card,
        frame_rate=model.codec.frame_rate,
        codec_hash=model.codec.weights_hash,
        sample_rate=model.features.sample_rate,
        delay=head.acoustic_delay,
        steps=state.step,
        samples=state.samples,
        ranks=topology.data * topology.tensor,
        data=topology.data,
        tensor=topology.tensor,
        zero=topology.zero,
        fingerprints="\n".join(f"| {key} | `{value}` |" for key, value in state.fingerprints.items()),
    )


def _describe(stack: TransformerConfig) -> str:
    heads = f"{stack.num_heads} heads" + ("" if stack.kv_heads == stack.num_heads else f" ({stack.kv_heads} key/value)")
    return f"{stack.num_layers} layers x {stack.hidden_size}, {heads}, MLP {stack.intermediate_size} {stack.mlp}"
