"""The training objective: head and cross-entropy in chunks of tokens, weighted per token."""

from llmtrain.loss.cross_entropy import HeadLike, LossOutput, head_loss

__all__ = ["HeadLike", "LossOutput", "head_loss"]
