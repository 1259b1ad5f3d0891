"""Medical text, from scratch, on two CPU cores in an hour and a half: `configs/medical.py`, with `--config.domain`.

The domain folder is made of public data; README, "Real medical text", says which and how. A small GPT with a tokenizer
of its own learns the text, then two classifications and three generations in one mixture.
"""

from ml_collections import ConfigDict

from configs import domain

# The corpus shares few words with the tasks: what these train on is read as text, too.
TEXTS = (
  ("dialogues", "/note_section/train.jsonl", "input"),
  ("notes", "/write_note/train.jsonl", "target"),
  ("messages", "/summarize_question/train.jsonl", "input"),
)


def get_config(arg: str = "gpt") -> ConfigDict:
  """Returns the config.

  Args:
    arg: "gpt" (what README's figures are of) or "t5".

  Raises:
    ValueError: another architecture.
  """
  if arg not in ("gpt", "t5"):
    raise ValueError(f"configs/medical.py:{arg}: known are gpt and t5")
  config = domain.get_config(f"{arg}-tiny")
  config.domain = "medical"
  config.cpu_devices = 1  # Muon's products are made once on a device, so two devices would make them twice
  sizes = {"embed_dim": 192, "heads": 6, "head_dim": 32, "mlp_dim": 512}
  # Muon learns in 200 steps here what Adafactor does in 500, from a step that is a seventh slower.
  config.optimizer.update({"name": "muon", "learning_rate": 1e-2, "b2": 0.95, "weight_decay": 0.02, "warmup_steps": 50})
  config.data.batch_size = 9 if arg == "t5" else 6
  config.data.update({"encoder_length": 384, "decoder_length": 128} if arg == "t5" else {"decoder_length": 640})
  config.train.log_every_steps = 50
  config.evaluate.max_new_tokens = 128
  config.arms.update({"only": "none", "without_continued": False})  # each would take as long as the main line
  folder = config.get_ref("domain")  # of what `--config.domain` says in the end
  with config.unlocked():
    for name, file, field in TEXTS:
      config.sources[name] = ConfigDict({"path": folder + file, "fields": {"text": field}})
    depth = {"layers": 4, "kv_heads": 6} if arg == "gpt" else {"encoder_layers": 4, "decoder_layers": 3}
    config.model.overrides = ConfigDict(sizes | depth)
    stages = config.stages
    stages.base.update({"train": {"steps": 300}, "data": {"mixture": {"domain": 0.7, "general": 0.3}}})
    stages.base.optimizer = {"final_fraction": 0.5}
    texts = {"domain": 0.85, "dialogues": 0.08, "notes": 0.03, "messages": 0.02, "general": 0.02}
    stages.continued.update({"train": {"steps": 2000}, "data": {"mixture": texts, "mixture_unit": "tokens"}})
    stages.continued.data.loss_normalisation = "token"  # by example, short texts have most of it
    stages.continued.optimizer = {"final_fraction": 0.1}
    stages.multitask.update({"train": {"steps": 2600}, "model": {"dropout": 0.08}})
    # Clinical notes are few (1,200) and the hardest; each is seen several times, hence the dropout.
    mixture = {"note_section": 0.2, "write_note": 0.22, "passage_topic": 0.23, "write_question": 0.17}
    mixture.update({"summarize_question": 0.08, "domain": 0.06, "general": 0.04})
    stages.multitask.data.mixture = mixture  # all of it: "tasks" has no share here
    stages.multitask.optimizer = {"learning_rate": 6e-3}
  return config.lock()
