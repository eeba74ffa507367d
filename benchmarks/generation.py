"""Generation with cached keys and values against computing the whole text for every token.

    python benchmarks/generation.py [--rounds 3]

A Llama of 6 layers, 256 wide, with random weights continues prompts of 96 tokens by 64, greedily,
in float32 with one thread: one text without a cache, as ``model(tokens)[:, -1]`` in a loop; one
with it; eight with it, of different lengths. Tokens per second of processor time, in turn, since
other work on the machine would be counted otherwise. The texts of the first two are equal. Goes to
benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import common
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.eval.generation import Sampling, generate
from llmtrain.model import Decoder, build_model, complete

PROMPT, NEW, ROWS, VOCAB = 96, 64, 8, 4096
GREEDY = Sampling(temperature=0)


@torch.no_grad()
def uncached(model: Decoder, prompt: list[int]) -> list[int]:
    """The plain loop."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    cfg = complete(ModelConfig(d_model=256, n_layers=6, n_heads=4, vocab_size=VOCAB), None, 256)
    model = build_model(cfg, seed=0, device="cpu", compute_dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    lengths = [PROMPT - 9 * i for i in range(ROWS)]
    prompts = [torch.randint(0, VOCAB, (n,), generator=random).tolist() for n in lengths]

    def cached(count: int) -> list[list[int]]:
        found = generate(model, prompts[:count], NEW, 256, GREEDY)
        return [text.tokens for text in found]

    def rate(work: Callable[[], object], texts: int) -> Callable[[], float]:
        def measure() -> float:
            begin = time.process_time()
            work()
            return texts * NEW / (time.process_time() - begin)

        return measure

    equal = uncached(model, prompts[0]) == cached(1)[0]
    readings = common.interleaved(
        {
            "uncached, 1 text": rate(lambda: uncached(model, prompts[0]), 1),
            "cached, 1 text": rate(lambda: cached(1), 1),
            "cached, 8 texts": rate(lambda: cached(ROWS), ROWS),
        },
        rounds,
    )
    plain = readings["uncached, 1 text"]["median"]
    result = {
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "texts_equal": equal,
        "tokens_per_cpu_second": readings,
        "over_uncached": {name: one["median"] / plain for name, one in readings.items()},
    }
    print(common.write_result("generation", result))
    for name, factor in result["over_uncached"].items():
        print(f"{name}: {readings[name]['median']:.0f} tokens/s, {factor:.1f} times")


if __name__ == "__main__":
    main()
