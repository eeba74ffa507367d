"""From text to batches.

``sources`` reads raw text, ``prepare`` turns it into a corpus of MDS shards, ``formats`` opens
tokenized data of any kind as one flat stream, ``mixture`` and ``order`` say which sample is number
i, ``packing`` and ``loader`` make the batches of a rank, ``plan`` puts a run's data together.

Nothing is imported here: preparing text needs no torch, and reading batches no tokenizer.
"""
