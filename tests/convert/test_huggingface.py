"""Conversion from and to Hugging Face's formats, against transformers' own models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_folders import LLAMA3, MODELS, SEQ, VOCAB, run_convert, their_model
from helpers.tiny import make_corpus, tiny_config

from llmtrain.checkpoint import verify
from llmtrain.cli.main import main
from llmtrain.config.factorized import FactorizedConfig
from llmtrain.config.rope import RopeScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.architectures import ARCHITECTURES, fitting_architecture
from llmtrain.errors import CheckpointError
from llmtrain.eval.loading import load_trained
from llmtrain.model import complete
from llmtrain.model.rotary import Rotation


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    import transformers as hf

    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "hf")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "ours") == 0
    assert verify(tmp_path / "ours") == []
    ours = load_trained(tmp_path / "ours", torch.device("cpu"), ["precision.compute=fp32"])
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours.model(tokens), expected, atol=1e-5, rtol=1e-5)

    assert run_convert("to-hf", tmp_path / "ours", tmp_path / "back") == 0
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(back) is type(theirs)
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, expected)

    assert run_convert("from-hf", tmp_path / "back", tmp_path / "again") == 0
    assert run_convert("to-hf", tmp_path / "again", tmp_path / "twice") == 0
    for file in sorted((tmp_path / "back").iterdir()):
        assert (tmp_path / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bf16_shards_and_small_files_survive(tmp_path: Path) -> None:
    theirs = their_model("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    extra = {"generation_config.json": "{}", "chat_template.jinja": "{{ messages }}"}
    for file, text in extra.items():
        (tmp_path / "hf" / file).write_text(text)
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "ours", "--shard-gb", "0.0001") == 0
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert all(t.dtype == torch.float32 for t in tensors(tmp_path / "ours").values())
    assert run_convert("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-gb", "0.00005") == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    written = tensors(tmp_path / "back")
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    for key, value in theirs.state_dict().items():
        assert written[key].dtype == torch.bfloat16 and torch.equal(written[key], value), key
    for file, text in extra.items():
        assert (tmp_path / "back" / file).read_text() == text


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """The vocabulary is the largest tensor of this model, its blocks are many times as much."""
    import transformers as hf
    from helpers.memory import allocated

    config = hf.LlamaConfig(
        vocab_size=40_000, hidden_size=128, intermediate_size=256, num_hidden_layers=40,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=SEQ,
        tie_word_embeddings=True, pad_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    largest = 40_000 * 128 * 4
    assert sum(t.numel() * 4 for t in tensors(tmp_path / "hf").values()) > 1.8 * largest
    for action, src, dst in (("from-hf", "hf", "ours"), ("to-hf", "ours", "back")):
        work = allocated(lambda: run_convert(action, tmp_path / src, tmp_path / dst))  # noqa: B023
        assert work.result == 0 and work.peak < 1.3 * largest + (20 << 20)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """A config.json leaves out what its class has as a default."""
    import transformers as hf

    real = hf.AutoConfig.for_model(kind)
    for key, value in ARCHITECTURES[kind].defaults.items():
        if key == "rope_theta":
            assert real.rope_parameters["rope_theta"] == value
        elif key in ("rotary_emb_base", "rotary_pct"):
            name = {"rotary_pct": "partial_rotary_factor"}.get(key, "rope_theta")
            assert real.rope_parameters[name] == value
        elif key == "sliding_window":
            assert value in (4096, real.sliding_window)
        else:
            assert getattr(real, key) == value, key


def test_stretched_frequencies_are_those_of_transformers() -> None:
    import transformers as hf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = hf.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=LLAMA3)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    scaling = RopeScalingConfig("llama3", 4.0, 1.0, 4.0, 48)
    ours = Rotation(128, 500.0, scaling).frequencies()
    torch.testing.assert_close(ours.float(), expected, atol=0, rtol=2e-6)
    plain = Rotation(128, 500.0).frequencies()
    assert ours[0] == plain[0] and ours[-1] == plain[-1] / 4
    assert (ours[1:] < ours[:-1]).all()


def test_a_window_shortens_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers as hf

    config = hf.MistralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQ,
        sliding_window=20,
    )  # fmt: skip
    hf.MistralForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "ours") == 0
    assert "sliding_window" in capsys.readouterr().err
    assert load_trained(tmp_path / "ours", torch.device("cpu")).model_cfg.max_seq_len == 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, make_corpus(folder, documents=40), train__duration="2step")
    assert main(["train", str(config)]) == 0
    return folder / "runs" / "tiny"


def test_a_run_of_ours_opens_in_transformers(trained: Path, tmp_path: Path) -> None:
    import transformers as hf

    assert run_convert("to-hf", trained, tmp_path / "hf") == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours = load_trained(trained, torch.device("cpu"), ["precision.compute=fp32"])
    assert ours.tokenizer is not None
    ids = ours.tokenizer.encode("alpha beta gamma")
    with torch.no_grad():
        expected = ours.model(torch.tensor([ids]))
        torch.testing.assert_close(model(torch.tensor([ids])).logits, expected, atol=1e-5, rtol=0)
    assert model.config.eos_token_id == ours.tokenizer.eos_id


def test_a_new_run_begins_with_a_converted_model(trained: Path, tmp_path: Path) -> None:
    assert run_convert("to-hf", trained, tmp_path / "hf") == 0
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "ours") == 0
    assert main(["generate", str(tmp_path / "ours"), "--prompt", "alpha", "--tokens", "3"]) == 0
    corpus = load_trained(trained, torch.device("cpu")).cfg.data.corpus
    assert main(["eval", str(tmp_path / "ours"), f"data.corpus={corpus}"]) == 0


def broken(folder: Path, how: str) -> None:
    """Make a good folder bad in one way."""
    from safetensors.torch import save_file

    config = folder / "config.json"
    settings = json.loads(config.read_text())
    weights = tensors(folder)
    file = folder / "model.safetensors"
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "no config":
        config.unlink()
    elif how == "unknown architecture":
        config.write_text(json.dumps({**settings, "model_type": "mamba"}))
    elif how == "unknown rope":
        config.write_text(json.dumps({**settings, "rope_parameters": {"rope_type": "yarn"}}))
    elif how == "unknown activation":
        config.write_text(json.dumps({**settings, "hidden_act": "gelu"}))
    elif how == "other heads":
        config.write_text(json.dumps({**settings, "num_key_value_heads": 3}))
    elif how == "no length":
        config.write_text(json.dumps({**settings, "max_position_embeddings": 0}))
    elif how == "two heads":
        config.write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    elif how == "missing tensor":
        save_file({k: v for k, v in weights.items() if "norm" not in k}, file)
    elif how == "extra tensor":
        save_file({**weights, "model.layers.0.moe.gate": torch.zeros(2)}, file)
    elif how == "wrong shape":
        save_file({**weights, "model.norm.weight": torch.zeros(5)}, file)
    elif how == "quantised":
        save_file({**weights, "model.norm.weight": torch.zeros(48, dtype=torch.int8)}, file)
    elif how == "quantised config":
        config.write_text(json.dumps({**settings, "quantization_config": {"bits": 4}}))
    elif how == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif how == "missing shard":
        index = {"weight_map": {"a": "model-00002-of-00002.safetensors", "b": file.name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "shard elsewhere":
        index = {"weight_map": {"a": "../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "large tokenizer":
        shutil.copy(folder.parent / "tokenizer.json", folder / "tokenizer.json")


BROKEN = {
    "no folder": "is not a folder",
    "no config": "no config.json",
    "unknown architecture": "model_type is 'mamba'; llmtrain converts llama",
    "unknown rope": "rope_type 'yarn'",
    "unknown activation": "hidden_act 'gelu'",
    "other heads": "config.json: model.n_kv_heads: 3 does not divide n_heads 4",
    "no length": "config.json: model.max_seq_len: must be at least",
    "two heads": "lm_head.weight is another matrix than model.embed_tokens.weight",
    "missing tensor": "has no tensor",
    "extra tensor": "model.layers.0.moe.gate",
    "wrong shape": "model.norm.weight is [5] where config.json calls for [48]",
    "quantised": "quantised",
    "quantised config": "quantization_config",
    "pickle": "pytorch_model.bin, a pickle",
    "missing shard": "model-00002-of-00002.safetensors is missing",
    "shard elsewhere": "names no files of this folder",
    "cut short": "cut short",
    "large tokenizer": "the tokenizer has 257 tokens",
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_folders(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmtrain.data.tokenizer import byte_tokenizer_file

    their_model("llama").save_pretrained(tmp_path / "hf")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer_file("<|endoftext|>"))
    broken(tmp_path / "hf", how)
    capsys.readouterr()
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "ours") == 2
    err = capsys.readouterr().err
    assert BROKEN[how] in err and len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir() if "ours" in p.name) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm": "layernorm"}, "no architecture of transformers that llmtrain converts"),
        ({"activation": "relu"}, "model.activation=relu"),
        ({"qk_norm": "full"}, "the nearest is llama, which differs in model.qk_norm=full"),
    ],
)
def test_models_that_no_architecture_computes(changes: dict[str, Any], says: str) -> None:
    from llmtrain.convert.architectures import fitting_architecture
    from llmtrain.errors import CheckpointError

    cfg = complete(ModelConfig(vocab_size=100, **changes), None, 64)
    with pytest.raises(CheckpointError) as caught:
        fitting_architecture(cfg, None)
    assert says in str(caught.value)


def test_the_largest_presets_fit_an_architecture() -> None:
    from llmtrain.config import load_config
    from llmtrain.convert.architectures import fitting_architecture

    expected = {"gpt2": "gpt2", "llama": "llama", "olmo2": "olmo2", "qwen2": "qwen2"}
    expected["qwen3"] = "qwen3"
    for path in sorted(Path("configs/models").glob("*.yaml")):
        family = path.stem.partition("-")[0].partition(".")[0]
        wanted = expected[{"llama2": "llama", "llama3": "llama"}.get(family, family)]
        model = load_config(path).model
        cfg = complete(model, model.vocab_size or 1000, model.max_seq_len or 64)
        assert fitting_architecture(cfg, None).name == wanted, path


def test_factors_stay_in_llmtrains_format() -> None:
    section = FactorizedConfig()
    cfg = complete(ModelConfig(vocab_size=61, d_model=32, factorized=section), None, 16)
    with pytest.raises(CheckpointError, match=r"layers of two factors \(model\.factorized\)"):
        fitting_architecture(cfg, None)
