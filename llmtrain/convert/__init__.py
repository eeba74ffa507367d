"""Hugging Face formats, both ways: architectures, names of tensors, folders of safetensors.

``from_huggingface`` turns a folder as ``transformers`` saves it into a checkpoint of ours,
``to_huggingface`` the other way. Tensors pass through one at a time.
"""

from llmtrain.convert.incoming import from_huggingface
from llmtrain.convert.outgoing import to_huggingface
from llmtrain.convert.peft import to_peft
from llmtrain.convert.peft_incoming import from_peft
from llmtrain.convert.writing import Converted

__all__ = ["Converted", "from_huggingface", "from_peft", "to_huggingface", "to_peft"]
