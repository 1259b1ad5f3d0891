"""Plans published settings of other systems with Argot's step, and prints their figures beside.

  python -m scripts.bench_plan [--only=llama2-7b-v5e,16b-v5e] [--output=FILE.json]
  python -m scripts.bench_plan --only=llama2-7b-v5e --search [--rows=4,8] [--vary=model.remat=full,attention]

Same model, topology, rows of a chip and length as MaxText's published settings; what remat keeps is ours, and so is the
mesh of the 32B, which is planned on MaxText's, too. MaxText 0.2.5's figures are those of its own `train_compile` with
jax 0.12, priced in the same way (kernels by shape at half of the peak, exposed collectives, the compiler's cycles); T5
has no peer. --search looks, as `argot plan --search` does, for the best mesh, rows of a chip and what --vary lists, for
--seconds a setting, and compares by the time of a token. A compilation takes minutes. Needs libtpu: pip install
'argot[plan]'. Everything is an estimate; nothing runs.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts import flags
from scripts.plan import search_flags, searched_rows

_SCALED = {"layers": 32, "heads": 64, "kv_heads": 64, "head_dim": 128, "mlp_dim": 28672}
_32B = {**_SCALED, "embed_dim": 8192}


class Row(NamedTuple):
  """A setting.

  Attributes:
    topology: for `argot plan`.
    model: config.model's size, or its overrides.
    rows, length: rows of a chip, and tokens in each (T5: on both sides).
    remat: ours.
    mesh: sizes.
    loss_chunk_tokens: ours: fewer take less memory and more time.
    peer: MaxText's memory (GiB) and ms a step, cyc and mid; None = there is none.
  """

  topology: str
  model: str | dict[str, Any]
  rows: int
  length: int
  remat: str
  mesh: dict[str, int]
  peer: tuple[float, float, float] | None
  architecture: str = "gpt"
  loss_chunk_tokens: int = 8192


ROWS: dict[str, Row] = {
  "llama2-7b-v5e": Row("v5e:16x16", "llama2-7b", 4, 2048, "attention", {"fsdp": 256}, (9.97, 3215, 3053)),
  "16b-v5e": Row(
    "v5e:16x16",
    {**_SCALED, "embed_dim": 4096},
    6,
    2048,
    "full",
    {"fsdp": 256},
    (8.64, 11067, 10611),
    loss_chunk_tokens=2048,
  ),
  "llama2-7b-v6e": Row("v6e:16x16", "llama2-7b", 12, 4096, "full", {"fsdp": 256}, (23.2, 5114, 5257)),
  "32b-v5p": Row("v5p:4x4x4", _32B, 6, 2048, "qkv+attention+out+gate+up", {"fsdp": 64}, (88.3, 7745, 7166)),
  # On the mesh that MaxText's setting has, too.
  "32b-v5p-tensor": Row(
    "v5p:4x4x4", _32B, 6, 2048, "qkv+attention+gate", {"fsdp": 16, "tensor": 4}, (88.3, 7745, 7166)
  ),
  "t5-xxl-v5e": Row("v5e:16x16", "t5-v1.1-xxl", 4, 512, "full", {"fsdp": 256}, None, "t5"),
  "t5-xl-v5e": Row("v5e:8x8", "t5-v1.1-xl", 4, 512, "full", {"fsdp": 64}, None, "t5"),
}


def config_of(row: Row):
  """Returns the config of a row; each has 32,000 tokens and AdamW."""
  from configs.base import get_config

  config = get_config()
  config.architecture = row.architecture
  config.model.dtype, config.model.remat, config.model.vocab_size = "bfloat16", row.remat, 32_000
  config.tokenizer.path, config.tokenizer.vocab_size = "train", 32_000
  if isinstance(row.model, str):
    config.model.size = row.model
  else:
    config.model.size = "custom"
    with config.unlocked():
      config.model.overrides.update(row.model)
  config.mesh.update({"data": 1, **row.mesh})
  config.data.encoder_length = config.data.decoder_length = row.length
  config.data.batch_size = row.rows * math.prod(row.mesh.values())
  config.train.loss_chunk_tokens = row.loss_chunk_tokens
  return config


def main() -> None:
  """Plans the rows and prints a table, or searches each one's best."""
  values = flags.new()
  flags.string(values, "only", ",".join(ROWS), "rows, by name")
  flags.string(values, "output", None, "JSON file to write, too")
  search_flags(values)
  values = flags.parse(values, "bench_plan", __doc__, sys.argv[1:], [])
  if unknown := set(values.only.split(",")) - set(ROWS):
    raise SystemExit(f"--only: unknown {sorted(unknown)}; known: {list(ROWS)}")
  rows = searched_rows(values)
  chosen = {name: ROWS[name] for name in values.only.split(",")}
  if values.search:
    found = {name: search(row, rows, values.vary, values.seconds) for name, row in chosen.items()}
  else:
    print(
      "| setting | remat | GiB | cyc, ms | mid | roof | MFU by mid | MaxText GiB, cyc, mid | cyc, mid / MaxText's |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    found = {name: planned(name, row) for name, row in chosen.items()}
  if values.output:
    Path(values.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def planned(name: str, row: Row) -> dict[str, float]:
  """Plans a row; prints its line of the table and returns its figures."""
  from train import plan

  made = plan.plan(config_of(row), plan.open_topology(row.topology))
  cyc, mid, roof = (1e3 * getattr(made.estimate, kind) for kind in ("cyc", "mid", "roof"))
  peer = "– | –"
  if row.peer:
    gib, peer_cyc, peer_mid = row.peer
    peer = f"{gib}, {peer_cyc:,}, {peer_mid:,} | {cyc / peer_cyc:.3f}, {mid / peer_mid:.3f}"
  memory = made.memory.total / plan.GIB
  times = f"{cyc:,.0f} | {mid:,.0f} | {roof:,.0f} | {made.mfu(mid / 1e3):.3f}"
  print(f"| {name} | {row.remat} | {memory:.2f} | {times} | {peer} |", flush=True)
  return {"gib": memory, "cyc_ms": cyc, "mid_ms": mid, "roof_ms": roof, "mfu_mid": made.mfu(mid / 1e3)}


def search(row: Row, rows: Sequence[int], vary: str, seconds: int) -> list[dict[str, Any]]:
  """Searches a row's best setting with free mesh, rows and what is varied; prints and returns what fits, best first."""
  from train import plan, plan_search

  config, topology = config_of(row), plan.open_topology(row.topology)
  varied = plan_search.parse_vary(vary, config)
  trials = plan_search.explore(config, topology, rows, varied, seconds, lambda line: print(line, flush=True))
  found = []
  for trial in trials:
    if trial.plan:
      times = {kind: 1e3 * getattr(trial.plan.estimate, kind) for kind in ("cyc", "mid")}
      text, share = plan_search.describe(trial), {}
      if row.peer:
        theirs = dict(zip(times, row.peer[1:], strict=True))
        share = {kind: times[kind] / trial.candidate.rows / (theirs[kind] / row.rows) for kind in times}
        text += f"; a token takes {share['cyc']:.3f}, {share['mid']:.3f} of MaxText's time (cyc, mid)"
      print(text, flush=True)
      found.append({"setting": trial.candidate.overrides(), "share_of_peer": share, "ms": times})
  return found


if __name__ == "__main__":
  main()
