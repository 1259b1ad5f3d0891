"""The same models and steps in PyTorch, for the benchmarks: nanoGPT's architecture, and transformers' T5.

The only file that imports torch; `pip install 'argot[parity]'`. nanoGPT (github.com/karpathy/nanoGPT) is a pre-norm
transformer with learned positions, GELU, one fused projection into query, key and value, PyTorch's own attention, a
tied output matrix and biases; it is written anew here in its shape.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, dim: int, heads: int):
    super().__init__()
    self.heads = heads
    self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
    self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [B,T,D] to [B,T,D]."""
    rows, length, dim = x.shape
    q, k, v = (
      part.view(rows, length, self.heads, -1).transpose(1, 2)
      for part in self.qkv(self.attention_norm(x)).split(dim, dim=2)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(rows, length, dim))
    return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class NanoGPT(nn.Module):
  """A GPT in nanoGPT's shape."""

  def __init__(self, layers: int, dim: int, heads: int, length: int, vocab_size: int):
    super().__init__()
    self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(length, dim)
    self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
    self.norm = nn.LayerNorm(dim)
    self.head = nn.Linear(dim, vocab_size, bias=False)
    for module in self.modules():
      if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    self.head.weight = self.tokens.weight

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean loss and the logits, as nanoGPT does."""
    x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
    for block in self.blocks:
      x = block(x)
    logits = self.head(self.norm(x))
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1)), logits


class T5Loss(nn.Module):
  """transformers' T5, called like `NanoGPT`."""

  def __init__(self, settings: Mapping[str, Any]):
    super().__init__()
    config = transformers.T5Config(**settings, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)
    self.model = transformers.T5ForConditionalGeneration(config).train()

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean loss and the logits, as transformers does; the decoder's inputs are the targets, shifted."""
    output = self.model(input_ids=tokens, labels=targets)
    return output.loss, output.logits


class OnlyLoss(nn.Module):
  """Keeps a model's logits to itself, so that a compiler need not keep them at all."""

  def __init__(self, model: nn.Module):
    super().__init__()
    self.model = model

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
    """Returns the mean loss."""
    return self.model(tokens, targets)[:1]


def nano_gpt(shape: Mapping[str, int]) -> nn.Module:
  """nanoGPT; `shape` as in scripts/bench_train.py."""
  return NanoGPT(shape["layers"], shape["dim"], shape["heads"], shape["length"], shape["vocab_size"])


def hf_t5(shape: Mapping[str, int]) -> nn.Module:
  """T5 v1.1."""
  sizes = {"d_model": shape["dim"], "d_ff": shape["mlp_dim"], "num_layers": shape["layers"], "d_kv": 64}
  sizes |= {"num_heads": shape["heads"], "vocab_size": shape["vocab_size"], "feed_forward_proj": "gated-gelu"}
  return T5Loss(sizes | {"tie_word_embeddings": False})


MODELS: dict[str, Callable[[Mapping[str, int]], nn.Module]] = {"gpt": nano_gpt, "t5": hf_t5}


MODES: dict[str, Callable[[nn.Module], Callable]] = {
  "eager": lambda model: model,
  "compile": torch.compile,
  "lean": lambda model: torch.compile(OnlyLoss(model)),
}


def trainer(name: str, shape: Mapping[str, int], mode: str, device: str, batches: Callable[[], Iterator]):
  """Returns a turn that makes one training step: AdamW (fused on a GPU), gradients clipped at 1.

  Args:
    name: a name in `MODELS`.
    shape: see scripts/bench_train.py.
    mode: a name in `MODES`.
    device: "cpu" (float32) or "cuda" (bfloat16 by autocast).
    batches: makes the iterator of (tokens, targets), int64.
  """
  torch.manual_seed(0)
  cuda = device == "cuda"
  torch.set_float32_matmul_precision("high" if cuda else "highest")
  if not cuda:
    torch.set_num_threads(shape["threads"])
    torch.set_flush_denormal(True)  # as XLA does: transformers' first T5 has losses of 80, whose exponentials are such
  model = MODELS[name](shape).to(device)
  decayed = [p for p in model.parameters() if p.ndim >= 2]
  others = [p for p in model.parameters() if p.ndim < 2]
  groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=cuda)
  run, data = MODES[mode](model), batches()

  def turn() -> float:
    tokens, targets = (torch.from_numpy(x).to(device) for x in next(data))
    with torch.autocast(device, torch.bfloat16, enabled=cuda):
      loss, *_ = run(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return turn


def save_random(name: str, shape: Mapping[str, int], folder: str) -> None:
  """Writes a random model in transformers' form: GPT-2 or T5 v1.1; nothing in it ends a text."""
  torch.manual_seed(0)
  if name == "gpt":
    sizes = {"n_embd": shape["dim"], "n_layer": shape["layers"], "n_head": shape["heads"]}
    sizes |= {"n_positions": shape["length"], "vocab_size": shape["vocab_size"], "bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
  else:
    model = hf_t5(shape).model
  model.save_pretrained(folder)


def writer(name: str, folder: str, prompts: Any, count: int, threads: int):
  """Returns a turn that continues prompts greedily with transformers' `generate`, with its cache."""
  torch.set_num_threads(threads)
  form = {"gpt": transformers.GPT2LMHeadModel, "t5": transformers.T5ForConditionalGeneration}[name]
  model = form.from_pretrained(folder).eval()
  model.generation_config.eos_token_id = None
  tokens = torch.from_numpy(prompts)
  settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1, "pad_token_id": 0}

  def turn() -> list[int]:
    with torch.inference_mode():
      found = model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **settings)
    return found[0, -count:].tolist()

  return turn
