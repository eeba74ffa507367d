"""From a stream of documents to samples: nothing dropped, nothing twice, boundaries right."""

import numpy as np
import pytest
from helpers.streams import EOS, MemorySource, documents

from llmtrain.data.packing import Packing, Pick, Rows, samples_in


def all_samples(source: MemorySource, packing: Packing, weight: float = 1.0) -> Rows:
    n = samples_in(source.num_tokens, packing.seq_len)
    return packing.rows([Pick(source, j, weight) for j in range(n)])


@pytest.mark.parametrize("seq_len", [2, 7, 16, 33])
@pytest.mark.parametrize("n_tokens", [2, 3, 33, 34, 35, 200])
def test_every_token_but_the_first_is_predicted_exactly_once(seq_len: int, n_tokens: int) -> None:
    source = MemorySource("a", documents(n_tokens, 40)[:n_tokens])
    rows = all_samples(source, Packing(seq_len, False, False))
    real = rows.weights > 0
    assert rows.targets[real].tolist() == source.tokens[1:].tolist()
    assert rows.tokens[real].tolist() == source.tokens[:-1].tolist()
    assert rows.weights.sum() == n_tokens - 1
    assert (rows.doc_ids[~real] == -1).all()


def test_nothing_to_predict_is_no_sample() -> None:
    assert [samples_in(n, 8) for n in (0, 1, 2, 9, 10)] == [0, 0, 1, 1, 2]


def test_document_ids_and_positions_follow_the_documents() -> None:
    tokens = np.array([5, 6, EOS, 7, EOS, 8, 9, 10, EOS, 11, 12])
    rows = all_samples(MemorySource("a", tokens), Packing(5, True, True))
    assert rows.doc_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    # The tokens that begin a document (7, 8, 11) are not predicted from another document.
    assert rows.weights.tolist() == [[1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
    plain = all_samples(MemorySource("a", tokens), Packing(5, False, False))
    assert plain.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert plain.weights.tolist() == [[1] * 5] * 2


def test_the_sources_weight_multiplies_every_token() -> None:
    rows = all_samples(MemorySource("a", documents(1, 9)), Packing(8, False, False), 0.25)
    assert set(rows.weights.ravel().tolist()) <= {0.0, 0.25}
