"""Shared by all tests: eight virtual CPU devices, small models, packed batches, real data where it is present."""

import importlib.metadata
import importlib.util
import os
import tempfile

flags = " --xla_force_host_platform_device_count=8"
flags += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"  # compile quickly
# Half of the compiler's time. Later versions do not know it, nor does libtpu, which reads the same variable.
if importlib.metadata.version("jax").startswith("0.10.") and not importlib.util.find_spec("libtpu"):
  flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_cache = tempfile.TemporaryDirectory(prefix="argot-cache-")  # until the last test
os.environ["ARGOT_CACHE"] = _cache.name

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import settings

from data.features import CONVERTERS, Example, Layout
from data.tokenizer import Tokenizer
from models import MODELS, Model
from models.sharding import make_mesh

# Speed is measured elsewhere, not in tests. CI draws the same examples each time; a run by hand draws new ones.
settings.register_profile("untimed", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("untimed")

VOCAB = 100
SMALL = {
  "gpt": {"layers": 2, "embed_dim": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "mlp_dim": 64},
  "t5": {"encoder_layers": 2, "decoder_layers": 2, "embed_dim": 32, "heads": 4, "head_dim": 8, "mlp_dim": 64},
}
# name -> (architecture, row of SIZES, further fields): every form of the two architectures
FORMS = {
  "gpt": ("gpt", "tiny", {}),
  "gpt-grouped": ("gpt", "tiny", {"kv_heads": 2, "tied": False}),
  "gpt2": ("gpt", "tiny-gpt2", {}),
  "mistral": ("gpt", "mistral-7b", {"window": 3, "kv_heads": 2}),
  "qwen2": ("gpt", "qwen2.5-0.5b", {}),
  "qwen3": ("gpt", "qwen3-8b", {}),
  "gemma2": ("gpt", "gemma2-2b", {"window": 3, "kv_heads": 2, "attention_scale": 0.3}),
  "gemma3": ("gpt", "gemma3-1b", {"window": 3, "pattern": "lg", "rope_scaling": ("linear", 8.0)}),
  "t5": ("t5", "tiny", {}),
  "t5-v1.0": ("t5", "tiny-v1.0", {}),
}


def small_model(form: str, vocab_size: int = VOCAB, **fields) -> Model:
  """Builds a model of a few thousand parameters in one of `FORMS`."""
  architecture, size, more = FORMS[form]
  return MODELS[architecture](size, vocab_size, **{**SMALL[architecture], **more, **fields})


def distinct_params(model: Model, seed: int = 0):
  """Parameters with every entry different, norms and biases too, so that a mix-up shows."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2 + 0.05, jnp.float32), shapes)


def layout(architecture: str, **fields) -> Layout:
  """A batch form of 16 encoder and 24 decoder tokens (gpt: 32)."""
  length = {"t5": (16, 12), "gpt": (0, 24)}[architecture]
  return Layout(architecture, *length, start_id=0, eos_id=1, **fields)


def examples(count: int, seed: int = 0, longest: int = 6) -> list[Example]:
  """Random pairs of 2 to `longest` tokens on either side, ending in EOS."""
  rng = np.random.default_rng(seed)

  def tokens() -> np.ndarray:
    return np.append(rng.integers(3, VOCAB, rng.integers(1, longest)), 1).astype(np.int32)

  return [Example(tokens(), tokens(), i % 2, usual=(2.5, 4.0)[i % 2]) for i in range(count)]


def packed_batch(architecture: str, rows: int = 8, seed: int = 0, **fields) -> dict[str, np.ndarray]:
  """A batch with two or three examples in every row but the last, which has one."""
  pool = iter(examples(3 * rows, seed, longest=5))
  packed = [[next(pool) for _ in range(2)] for _ in range(rows - 1)] + [[next(pool)]]
  form = layout(architecture, **fields)
  return CONVERTERS[architecture](packed, form)


def blind_tokenizer() -> Tokenizer:
  """A tokenizer to which every word is the same unknown one."""
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
  return Tokenizer(backend, {"vocab_size": 3, "pad_id": 0, "eos_id": 1, "unk_id": 2, "start_id": 0, "sentinel_ids": []})


@pytest.fixture
def one_device():
  """Runs the test on a mesh of one device."""
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])) as mesh:
    yield mesh


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder of real data and tokenizers beside the project; skips where it is absent."""
  folder = Path(__file__).resolve().parent.parent.parent / "shared"
  if not folder.is_dir():
    pytest.skip("no ../shared beside the project")
  return folder


# Files that take minutes: the first ones, so that no process is left with one while the others are done.
LONG = ("recipe", "train", "processes", "attention_paths", "walk", "lora_train", "lora", "step", "context", "signals")


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
