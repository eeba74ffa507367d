"""Generation with cached keys and values against the model's plain forward and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import hf_models

from llmtrain.config import from_dict
from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.rope import RopeScalingConfig
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import LlmtrainError
from llmtrain.eval.generation import Sampling, generate
from llmtrain.model import Decoder, KeyValueCache, apply_formats, build_model, complete

VOCAB = 101
MUS = {"norm_placement": "post_branch", "norm": "layernorm", "activation": "gelu"}
GPT2: dict[str, Any] = {
    "norm": "layernorm", "norm_bias": True, "position": "learned", "activation": "gelu_tanh",
    "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "tie_embeddings": True,
}  # fmt: skip
STRETCHED = RopeScalingConfig(kind="llama3", factor=4.0, original_max_position=16)
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2},
    "llama 3": {"n_kv_heads": 1, "rope_scaling": STRETCHED},
    "qwen3": {"n_kv_heads": 2, "qk_norm": "head", "d_head": 16},
    "olmo2": {"qk_norm": "full", "norm_placement": "post_branch"},
    "gpt2": GPT2,
    "neox": {"rope_fraction": 0.5, "parallel_residual": True, "norm": "layernorm"},
    "without positions": {"position": "none"},
    "mus": {**MUS, "scaling": ScalingConfig(parametrization="mus", tau=0.4)},
    "sqrt": {"n_kv_heads": 2, "scaling": ScalingConfig(attention="sqrt")},
    "adapters": {"n_kv_heads": 2, "adapters": AdapterConfig(rank=3)},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [27], [1, 8, 2, 8, 18]]


def build(name: str, **keys: Any) -> Decoder:
    shape = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "init_std": 0.2}
    cfg = complete(ModelConfig(**{**shape, **KINDS[name], **keys}), None, 32)
    model = build_model(cfg, seed=3, device="cpu", compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for param_name, param in model.named_parameters():
        if param_name.endswith(".b.weight"):  # zero at first: adapters without effect
            param.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text(name: str) -> None:
    model = build(name)
    texts = [list(prompt) for prompt in PROMPTS]
    cache = KeyValueCache(3, 17, torch.device("cpu"))
    width = max(map(len, texts))
    cache.begin([len(text) for text in texts])
    fresh = torch.tensor([text + [77] * (width - len(text)) for text in texts])
    for step in range(6):
        logits = model(fresh, cache=cache)
        assert logits.shape == (3, 1, VOCAB)
        for i, text in enumerate(texts):
            expected = model(torch.tensor([text]))[0, -1]
            assert expected.std() > 0.03
            torch.testing.assert_close(logits[i, 0], expected, atol=3e-6, rtol=3e-5)
            text.append((7 * step + 31 * i) % VOCAB)
        cache.begin([1, 1, 1])
        fresh = torch.tensor([[text[-1]] for text in texts])


@torch.no_grad()
def test_several_tokens_at_a_time_and_rows_that_leave() -> None:
    model = build("llama")
    cache = KeyValueCache(3, 24, torch.device("cpu"))
    tokens = torch.randint(0, VOCAB, (3, 14), generator=torch.Generator().manual_seed(2))
    expected = model(tokens)
    cache.begin([5, 5, 5])
    model(tokens[:, :5], cache=cache)
    cache.keep([0, 2])
    cache.begin([7, 7])
    got = model(tokens[[0, 2], 5:12], cache=cache)[:, 0]
    torch.testing.assert_close(got, expected[[0, 2], 11], atol=1e-5, rtol=1e-5)
    cache.begin([2, 2])
    got = model(tokens[[0, 2], 12:], cache=cache)[:, 0]
    torch.testing.assert_close(got, expected[[0, 2], 13], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_does_not_depend_on_the_others(name: str) -> None:
    model, sampling = build(name), Sampling(temperature=1.3, top_k=0, top_p=0.95, seed=5)
    prompts = [*PROMPTS, [50, 60], [3] * 15]
    alone = [generate(model, [p], 12, 32, sampling, eos_id=0)[0] for p in prompts]
    assert len({tuple(text.tokens) for text in alone}) == len(prompts)
    assert generate(model, prompts, 12, 32, sampling, eos_id=0) == alone
    assert generate(model, prompts[::-1], 12, 32, sampling, eos_id=0, batch=2) == alone[::-1]
    # Ends at different times: the others go on in a smaller batch.
    stopped = generate(
        model, prompts, 12, 32, sampling, stop=lambda i, new: len(new) == 2 + i, eos_id=0
    )
    for i, (short, long) in enumerate(zip(stopped, alone, strict=True)):
        assert short.tokens == long.tokens[: 2 + i]


@pytest.mark.parametrize("format", ["mus_fp8", "fp8_current"])
@torch.no_grad()
def test_fp8_numbers(format: str) -> None:
    """Static scales: the uncached numbers. Scales of the whole input: texts one by one."""
    model = build("mus" if format == "mus_fp8" else "llama")
    cfg = from_dict({"quantization": {"format": format, "min_features": 1}})
    apply_formats(model, model.cfg, cfg, torch.device("cpu"))
    greedy = Sampling(temperature=0)
    together = generate(model, PROMPTS, 8, 32, greedy)
    assert together == [generate(model, [p], 8, 32, greedy)[0] for p in PROMPTS]
    if format == "mus_fp8":
        cache = KeyValueCache(1, 20, torch.device("cpu"))
        cache.begin([10])
        text = torch.tensor([PROMPTS[0]])
        model(text[:, :10], cache=cache)
        cache.begin([1])
        got, expected = model(text[:, 10:], cache=cache)[0, 0], model(text)[0, -1]
        # A number next to the middle between two FP8 values may fall to the other side.
        assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2"])
def test_greedy_texts_are_those_of_transformers(name: str) -> None:
    theirs, shape = hf_models.make(name, False)
    shape = complete(shape, None, 64)
    ours = Decoder(shape)
    weights = {n: p.detach() for n, p in theirs.named_parameters()}
    hf_models.load(ours, hf_models.renamed(weights, shape))
    prompts = [[5, 17, 3, 80], [9], [33, 2, 71, 4, 4, 60, 12]]
    width = max(map(len, prompts))
    padded = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 1
    expected = theirs.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=20)
    got = generate(ours.eval(), prompts, 20, 64, Sampling(temperature=0))
    assert [text.tokens for text in got] == expected[:, width:].tolist()


class Fixed(torch.nn.Module):
    """Logits that prefer (last token + 1) mod 7, the one after it a little less."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        last = tokens.gather(1, cache.last[:, None])
        next_, after = (torch.nn.functional.one_hot((last + n) % 7, 7) for n in (1, 2))
        return 4.0 * next_ + 2.0 * after


def test_how_a_text_ends() -> None:
    model, greedy = Fixed(), Sampling(temperature=0)
    short, long = generate(model, [[0], [0, 1, 2]], 5, 7, greedy)
    assert (short.tokens, short.ended) == ([1, 2, 3, 4, 5], "length")
    assert (long.tokens, long.ended) == ([3, 4, 5, 6], "context")
    (text,) = generate(model, [[0]], 9, 20, greedy, eos_id=3)
    assert (text.tokens, text.ended) == ([1, 2], "eos")
    (text,) = generate(model, [[0]], 9, 20, greedy, stop=lambda i, new: new[-2:] == [1, 2])
    assert (text.tokens, text.ended) == ([1, 2], "stop")


def test_what_sampling_leaves_out() -> None:
    """Probabilities of the best two are 0.826 and 0.112: a share of 0.9 needs both."""
    model = Fixed()

    def drawn(**keys: Any) -> set[int]:
        rules = [Sampling(temperature=1.0, seed=seed, **keys) for seed in range(150)]
        return {generate(model, [[0]], 1, 9, rule)[0].tokens[0] for rule in rules}

    assert drawn(top_k=0) > {1, 2}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=0, top_p=0.9) == {1, 2}
    assert drawn(top_k=0, top_p=0.8) == {1}


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([[1], []], "prompt 2 is empty"), ([[1] * 8], "has 8 tokens.*at most 8.*shorten it")],
)
def test_bad_prompts(prompts: list[list[int]], says: str) -> None:
    with pytest.raises(LlmtrainError, match=says):
        generate(Fixed(), prompts, 4, 8)
