"""The whole recipe on your own domain folder: `configs/domain.py:ARCH-SIZE --config.domain=FOLDER`.

`ARCH-SIZE` is an architecture and a row of its SIZES: t5-tiny, gpt-tiny, t5-t5-v1.1-small, gpt-gpt2, …
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "t5-tiny") -> ConfigDict:
  """Returns the config.

  Args:
    arg: architecture and size, such as "t5-tiny".

  Raises:
    ValueError: not an architecture and a size.
  """
  architecture, _, size = arg.partition("-")
  if architecture not in ("t5", "gpt") or not size:
    raise ValueError(f"configs/domain.py:{arg}: expected t5-SIZE or gpt-SIZE, such as t5-tiny")
  config = base.get_config()
  config.architecture = architecture
  config.model.size = size
  config.tokenizer.path, config.tokenizer.vocab_size = "train", 4096
  config.model.scan_unroll = 4
  config.data.overlong = "truncate"
  config.data.task_limit, config.data.task_temperature = 4000, 2.0
  config.optimizer.learning_rate, config.optimizer.weight_decay = 2e-3, 0.1
  config.evaluate.max_new_tokens = 64
  if architecture == "t5":
    config.data.objective, config.data.encoder_length, config.data.decoder_length = "span_corruption", 256, 96
  else:
    config.data.objective, config.data.decoder_length = "next_token", 320
  steps = {"base": 200, "continued": 900, "multitask": 900}
  mixtures = {
    "base": {"general": 1.0},
    "continued": {"domain": 0.95, "general": 0.05},
    "multitask": {"tasks": 0.9, "domain": 0.1},
  }
  config.arms.only_steps = 300
  with config.unlocked():
    for name, mixture in mixtures.items():
      config.stages[name] = ConfigDict({"train": {"steps": steps[name]}, "data": {"mixture": mixture}})
  return config.lock()
