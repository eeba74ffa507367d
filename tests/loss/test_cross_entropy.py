"""Head and cross-entropy in chunks against the full logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain import ops
from llmtrain.config.schema import LossConfig, ModelConfig
from llmtrain.loss import LossOutput, head_loss
from llmtrain.model import Decoder, complete
from llmtrain.model.decoder import Embedding, Head
from llmtrain.ops import native

VOCAB, WIDTH = 53, 24


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not ops.native_loaded():
        pytest.skip("the compiled kernels are not built")
    if request.param == "reference":
        monkeypatch.setattr("llmtrain.ops.cross_entropy.usable", lambda x: False)
    return str(request.param)


def _head(dtype: torch.dtype = torch.float32, tied: bool = False, scale: float = 1.0) -> Head:
    cfg = complete(
        ModelConfig(
            vocab_size=VOCAB, vocab_multiple=16, d_model=WIDTH, n_heads=2, tie_embeddings=tied
        ),
        None,
        32,
    )
    from llmtrain.linear import matmul_for

    head = Head(cfg, Embedding(64, WIDTH, dtype), matmul_for(dtype), scale=scale)
    with torch.no_grad():
        head.weight.copy_(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5)))
    return head


def _inputs(b: int = 3, s: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(b, s, WIDTH, generator=generator)
    targets = torch.randint(0, VOCAB, (b, s), generator=generator)
    weights = torch.rand(b, s, generator=generator) * 2
    weights[0, 3:9] = 0.0
    weights[2] = 0.0
    return hidden, targets, weights


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cfg: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of loss and z-loss and the nll, straight from the definitions."""
    logits = hidden @ weight[:VOCAB].T
    lse = logits.exp().sum(-1).log()
    nll = lse - logits.gather(-1, targets[..., None])[..., 0]
    uniform = (lse[..., None] - logits).mean(-1)
    e = cfg.label_smoothing
    z = cfg.z_loss * lse**2
    return (weights * ((1 - e) * nll + e * uniform + z)).sum(), (weights * z).sum(), nll


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("chunk", [1, 7, 32, 33, 1000])
@pytest.mark.parametrize(
    ("z_loss", "smoothing", "scale"),
    [(0.0, 0.0, 1.0), (1e-2, 0.0, 1.0), (3e-3, 0.1, 1.0), (3e-3, 0.1, 0.37)],
)
def test_loss_and_gradients(chunk: int, z_loss: float, smoothing: float, scale: float) -> None:
    cfg = LossConfig(z_loss=z_loss, label_smoothing=smoothing, chunk_tokens=chunk)
    head = _head(scale=scale)
    hidden, targets, weights = _inputs()
    hidden.requires_grad_()
    out = head_loss(hidden, head, targets, weights, cfg, 17.5)
    upstream = 0.37
    (out.loss * upstream).backward()

    h64 = hidden.detach().double().requires_grad_()
    w64 = head.weight.detach().double().requires_grad_()
    total, z, nll = _reference(scale * h64, w64, targets, weights.double(), cfg)
    (total / 17.5 * upstream).backward()
    close = {"atol": 1e-6, "rtol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(out.loss, total / 17.5, **close)
    torch.testing.assert_close(out.z, z / 17.5, **close)
    torch.testing.assert_close(out.nll, nll, **close)
    torch.testing.assert_close(hidden.grad, h64.grad, **close)
    torch.testing.assert_close(head.weight.grad, w64.grad, **close)
    assert out.nll.dtype == out.loss.dtype == torch.float32
    assert not (out.nll.requires_grad or out.z.requires_grad)


@pytest.mark.usefixtures("kernels")
def test_padded_vocabulary_never_matters() -> None:
    hidden, targets, weights = _inputs()
    results = []
    for value in (0.0, 1e4, float("nan")):
        head = _head()
        with torch.no_grad():
            head.weight[VOCAB:] = value
        results.append(head_loss(hidden, head, targets, weights, LossConfig(), 1.0).loss.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("kernels")
def test_bf16_head_is_near_float64() -> None:
    cfg = LossConfig(z_loss=1e-3, chunk_tokens=9)
    head = _head(torch.bfloat16)
    hidden, targets, weights = _inputs()
    x = hidden.bfloat16().requires_grad_()
    out = head_loss(x, head, targets, weights, cfg, 10.0)
    out.loss.backward()
    h64 = x.detach().double().requires_grad_()
    w64 = head.weight.detach().bfloat16().double().requires_grad_()
    total, _, _ = _reference(h64, w64, targets, weights.double(), cfg)
    (total / 10).backward()
    assert out.nll.dtype == torch.float32 and x.grad is not None and head.weight.grad is not None
    assert x.grad.dtype == torch.bfloat16 and head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.loss, total / 10, rtol=3e-3, atol=0, check_dtype=False)
    for ours, reference in ((x.grad, h64.grad), (head.weight.grad, w64.grad)):
        assert reference is not None
        assert (ours.double() - reference).norm() < 1e-2 * reference.norm()


def test_forms_no_gradients_when_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, weights = _inputs()
    head = _head()
    with_grad = head_loss(hidden.requires_grad_(), head, targets, weights, LossConfig(), 3.0)
    asked: list[bool] = []
    real = ops.cross_entropy_

    def spy(*args: object) -> object:
        asked.append(bool(args[-1]))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("llmtrain.loss.cross_entropy.cross_entropy_", spy)
    with torch.no_grad():
        out = head_loss(hidden, head, targets, weights, LossConfig(), 3.0)
    assert asked == [False] and not out.loss.requires_grad
    assert torch.equal(out.loss, with_grad.loss.detach())


def test_frozen_head_gives_only_hidden_gradients() -> None:
    hidden, targets, weights = _inputs()
    head = _head()
    head.weight.requires_grad_(False)
    hidden.requires_grad_()
    head_loss(hidden, head, targets, weights, LossConfig(), 3.0).loss.backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_denominator_may_be_a_tensor() -> None:
    hidden, targets, weights = _inputs()
    head = _head()
    a = head_loss(hidden, head, targets, weights, LossConfig(), 8.0).loss
    b = head_loss(hidden, head, targets, weights, LossConfig(), torch.tensor(8.0)).loss
    assert torch.equal(a, b)


def test_tied_weight_collects_both_gradients() -> None:
    cfg = complete(
        ModelConfig(vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2, tie_embeddings=True),
        None,
        16,
    )
    model = Decoder(cfg)
    from llmtrain.model import init_weights

    init_weights(model, 0)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    targets, weights = tokens.roll(-1, 1), torch.ones(2, 9)

    def run(detached: str) -> Tensor:
        model.zero_grad()

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            source = hidden.detach() if detached == "hidden" else hidden
            return head_loss(source, head, targets, weights, LossConfig(), 18.0)

        model(tokens, head_fn=head_fn).loss.backward()
        grad = model.embedding.weight.grad
        assert grad is not None
        return grad.clone()

    through_head = run("hidden")
    both = run("nothing")
    rows = torch.zeros(both.shape[0], dtype=torch.bool)
    rows[tokens.unique()] = True
    assert torch.equal(both[~rows], through_head[~rows]), "rows of absent tokens: the head alone"
    assert not torch.allclose(both[rows], through_head[rows])


def test_second_backward_is_refused() -> None:
    hidden, targets, weights = _inputs()
    out = head_loss(hidden.requires_grad_(), _head(), targets, weights, LossConfig(), 3.0)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.skipif(not native.native_loaded(), reason="the compiled kernels are not built")
@pytest.mark.parametrize("target", [-1, VOCAB, 63])
def test_target_outside_the_vocabulary_is_refused(target: int) -> None:
    hidden, targets, weights = _inputs()
    targets[1, 2] = target
    with pytest.raises(RuntimeError, match="target outside the vocabulary"):
        head_loss(hidden, _head(), targets, weights, LossConfig(), 3.0)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_weights_may_follow_from_the_losses(kernels: str, chunk: int) -> None:
    hidden, targets, weights = _inputs()
    cfg = LossConfig(chunk_tokens=chunk, z_loss=1e-3, label_smoothing=0.1)
    head, calls = _head(), []

    def gradients(weights: Tensor, **options: object) -> list[Tensor]:
        x = hidden.clone().requires_grad_()
        head.weight.grad = None
        out = head_loss(x, head, targets, weights, cfg, 3.0, **options)  # type: ignore[arg-type]
        (2 * out.loss).backward()
        assert x.grad is not None and head.weight.grad is not None
        return [out.loss.detach(), out.nll, out.z, x.grad, head.weight.grad]

    nll = head_loss(hidden, head, targets, weights, cfg, 3.0).nll
    expected = gradients(weights * nll.detach())
    changed = weights.clone()

    def weigh(found: Tensor) -> None:
        calls.append(found)
        changed.mul_(found)

    for ours, reference in zip(gradients(changed, weigh=weigh), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], nll.detach())
