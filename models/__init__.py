"""Models: Flax NNX inside, pure functions over nested dicts of arrays outside."""

from collections.abc import Callable

from models import gpt, t5
from models.model import Model

# A family is its file: `make(size, vocab_size, **fields) -> Model`.
MODELS: dict[str, Callable[..., Model]] = {"gpt": gpt.make_model, "t5": t5.make_model}

__all__ = ["MODELS", "Model"]
