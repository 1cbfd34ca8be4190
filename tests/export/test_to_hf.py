"""A checkpoint becomes a directory that transformers loads, bit for bit; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MimiModel

from megatron_omni.checkpoint.load import Checkpoint, open_checkpoint
from megatron_omni.export import to_hf as exporter
from megatron_omni.export.to_hf import to_hf
from megatron_omni.export.verify import verify
from megatron_omni.runtime.errors import InputError, OmniError, WorkError


@pytest.fixture
def copy(exported, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    """The export, to damage."""
    return Path(shutil.copytree(exported.folder, tmp_path / "copy"))


def edit_weights(folder: Path, name: str, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_are_bit_equal_and_logits_agree(trained, exported) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(exported.folder / "model.safetensors")
    ours = dict(trained.model.named_parameters())
    untouched = [name for name in ours if not name.startswith("llm.")]
    assert all(torch.equal(tensors[name], ours[name]) for name in untouched)
    layer, theirs = "llm.stack.layers.1.", "llm.model.layers.1."
    fused = [tensors[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(fused), ours[f"{layer}attention.qkv.weight"])
    fused = [tensors[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(torch.cat(fused), ours[f"{layer}mlp.up.weight"])
    codec = load_file(trained.codec / "model.safetensors")  # the names of its files, whatever transformers calls its modules
    assert all(torch.equal(tensors[f"codec.{name}"], tensor) for name, tensor in codec.items())
    assert exported.verified.max_abs_diff <= 1e-5
    assert exported.verified.tensors == len(tensors)
    assert exported.verified.step == 7


def test_llm_is_a_stock_model_with_its_tokenizer(trained, exported) -> None:  # type: ignore[no-untyped-def]
    llm, info = AutoModelForCausalLM.from_pretrained(exported.folder / "llm", output_loading_info=True)
    assert type(llm).__name__ == "LlamaForCausalLM"
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(exported.folder / "llm")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "three five"}], add_generation_prompt=True, return_tensors="pt")
    answer = llm.generate(**ids, max_new_tokens=4)
    assert answer.shape[1] <= ids["input_ids"].shape[1] + 4
    assert tokenizer.decode(answer[0])


def test_nothing_is_written_over(trained, exported) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="exists"):
        to_hf(trained.run, exported.folder, str(trained.codec))


def test_bfloat16(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    verified = to_hf(trained.run, tmp_path / "out", str(trained.codec), dtype="bfloat16")
    assert verified.max_abs_diff <= 1e-5
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if not name.startswith("codec."))
    assert all(tensor.dtype != torch.bfloat16 for name, tensor in tensors.items() if name.startswith("codec."))


def test_several_files_of_weights(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(exporter, "MAX_SHARD", "200KB")
    verified = to_hf(trained.run, tmp_path / "out", str(trained.codec))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert verified.max_abs_diff <= 1e-5


def test_another_codec_is_refused(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    codec = MimiModel.from_pretrained(trained.codec)
    with torch.no_grad():
        next(codec.parameters()).mul_(2)
    codec.save_pretrained(tmp_path / "codec")
    with pytest.raises(InputError, match="codec"):
        to_hf(trained.run, tmp_path / "out", str(tmp_path / "codec"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"lacks 1 tensors.*projector\.up\.weight"),
        ("extra", r"1 tensors that its model does not have.*spare"),
        ("shape", r"projector\.up\.weight has shape \(1, 64, 128\)"),
        ("nan", r"projector\.up\.weight holds 1 values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(  # type: ignore[no-untyped-def]
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    victim = "projector.up.weight"

    class Faulty(Checkpoint):
        def names(self) -> list[str]:
            names = super().names()
            return {"missing": [name for name in names if name != victim], "extra": [*names, "spare"]}.get(fault, names)

        def shape(self, name: str) -> tuple[int, ...]:
            shape = (3,) if name == "spare" else super().shape(name)
            return (1, *shape) if fault == "shape" and name == victim else shape

        def read_full(self, name, kind="param"):  # type: ignore[no-untyped-def]
            tensor = super().read_full(name, kind)
            if fault == "nan" and name == victim:
                tensor[0, 0] = torch.nan
            return tensor

    monkeypatch.setattr(exporter, "open_checkpoint", lambda path: Faulty(open_checkpoint(path).path))
    with pytest.raises(WorkError, match=message):
        to_hf(trained.run, tmp_path / "out", str(trained.codec))
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_one_changed_weight(trained, copy: Path) -> None:  # type: ignore[no-untyped-def]
    def flip(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name].view(torch.int32)[3] ^= 1  # the last bit of one element

    edit_weights(copy, "audio_head.pre_nn.no_text", flip)
    with pytest.raises(WorkError, match=r"audio_head\.pre_nn\.no_text differs"):
        verify(trained.run, copy)


@pytest.mark.parametrize("folder", ["", "llm"])
def test_verify_finds_a_missing_tensor(trained, copy: Path, folder: str) -> None:  # type: ignore[no-untyped-def]
    prefix = "" if folder else "llm."
    edit_weights(copy / folder, f"{prefix}model.norm.weight", dict.pop)
    with pytest.raises(WorkError, match=r"model\.norm\.weight"):
        verify(trained.run, copy)


def test_verify_finds_a_codec_of_other_weights(trained, copy: Path) -> None:  # type: ignore[no-untyped-def]
    edit_weights(copy, "codec.decoder.layers.0.conv.bias", lambda tensors, name: tensors[name].add_(1))
    with pytest.raises(WorkError, match="codec"):
        verify(trained.run, copy)


@pytest.mark.parametrize(("folder", "key"), [("", "llm_config"), ("llm", None)])
def test_verify_finds_a_configuration_that_computes_something_else(trained, copy: Path, folder: str, key: str | None) -> None:  # type: ignore[no-untyped-def]
    path = copy / folder / "config.json"
    config = json.loads(path.read_text())
    (config[key] if key else config)["rope_parameters"]["rope_theta"] = 600.0
    path.write_text(json.dumps(config))
    with pytest.raises(WorkError, match="differ"):
        verify(trained.run, copy)


def test_a_run_without_a_model_configuration_is_refused(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    checkpoint = open_checkpoint(trained.run)
    checkpoint.state = checkpoint.state.model_copy(update={"model": None})
    monkeypatch.setattr(exporter, "open_checkpoint", lambda path: checkpoint)
    with pytest.raises(OmniError, match="no whole model configuration"):
        to_hf(trained.run, tmp_path / "out", str(trained.codec))


def test_the_summary_has_the_keys_that_users_rely_on(exported) -> None:  # type: ignore[no-untyped-def]
    assert {"max_abs_diff", "tensors", "bytes"} <= dataclasses.asdict(exported.verified).keys()
